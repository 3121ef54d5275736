"""Recipes that make quantized files."""
