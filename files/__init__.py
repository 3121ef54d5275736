"""Writing a file whole or not at all, and going on with an unfinished one; nothing of models."""
