"""Captions in the schema that Ideogram 4 was trained on: checked, composed, written by a model."""
