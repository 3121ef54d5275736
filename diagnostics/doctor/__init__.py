"""``ideogram4-quant doctor``: what a machine has, what it lacks, and what it can run."""
