"""Deterministic methods of second order: curvature from products, a matrix, or past gradients."""
