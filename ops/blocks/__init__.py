"""GGUF block formats: decoding and encoding, one class a format."""
