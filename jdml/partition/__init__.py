"""Module 1: how samples, features, layers and computation are divided."""
