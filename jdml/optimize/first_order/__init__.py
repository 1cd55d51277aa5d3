"""Deterministic methods of first order: the gradient of all samples at every step."""
