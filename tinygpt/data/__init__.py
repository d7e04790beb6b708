"""Text or token files to memory-mapped tokens in a resumable order; tokenizers; downloads."""
