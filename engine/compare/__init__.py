"""Compare levels at the same seed: fidelity to a reference and legible text, with intervals."""
