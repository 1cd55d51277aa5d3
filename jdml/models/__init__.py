"""Flax models built on ``jdml.sharding`` alone."""
