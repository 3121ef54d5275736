"""What the kernels become without a GPU: compiled offline, and the machine code read."""
