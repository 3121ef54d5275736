"""Pairs of two levels on the pocket model: which copy takes a loss better, and why."""
