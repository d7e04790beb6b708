"""A trained model without Python: one C file, one HTML file, GGUF; and a server."""
