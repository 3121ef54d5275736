"""What computes: formulas, block formats, tensor layouts, kernels, and the choice among them."""
