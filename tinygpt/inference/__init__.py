"""Decoding over a key-value cache, and sampling."""
