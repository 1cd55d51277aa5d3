"""Stochastic methods: a few samples, or one coordinate, at every step."""
