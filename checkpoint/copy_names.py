"""The names of the two copies of the model."""

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
COPIES = (CONDITIONAL, UNCONDITIONAL)
