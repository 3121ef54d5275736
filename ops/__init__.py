"""Quantized tensor formats and arithmetic, from block formats to kernels; imports no sibling."""
