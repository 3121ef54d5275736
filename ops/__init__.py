"""Quantized tensor formats and arithmetic: block formats, layouts, reference formulas, kernels, dispatch."""
