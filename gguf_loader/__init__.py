"""The GGUF container: bounded header parsing and writing. Block formats live in ``ops.blocks``."""
