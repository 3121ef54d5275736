"""The pocket model: a small Ideogram 4, trained on a CPU, whose weights lie in this package."""
