"""Exchanges over a mesh axis, built on ``jax.lax`` collectives."""

from jdml.communicate.collectives.all_reduce import all_reduce_mean as all_reduce_mean
