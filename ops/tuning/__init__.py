"""Measuring the candidates of an op once a device, and keeping what was found."""
