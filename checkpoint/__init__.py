"""Every Ideogram 4 file layout in, canonical names out."""
