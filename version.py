"""The pack's version; imports nothing, so that everything may import it."""

__version__ = "0.3.0"
