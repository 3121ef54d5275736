"""Encoding in C for CPUs: built on request, never while importing; the formulas stay in torch."""
