"""Exchanges over a mesh axis, built on ``jax.lax`` collectives."""

from jdml.communicate.collectives.all_gather import all_gather as all_gather
from jdml.communicate.collectives.all_reduce import all_reduce_mean as all_reduce_mean
from jdml.communicate.collectives.all_to_all import all_to_all as all_to_all
from jdml.communicate.collectives.broadcast import broadcast as broadcast
from jdml.communicate.collectives.reduce_scatter import reduce_scatter_mean as reduce_scatter_mean
