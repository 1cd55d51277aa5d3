"""Distributed machine learning in JAX.

Four modules of the textbook taxonomy are four folders: ``partition`` (how data and models are
divided), ``optimize`` (what one worker does alone), ``communicate`` (what workers say to each
other) and ``aggregate`` (what becomes of their answers). ``sharding`` is the ground floor,
``models`` are Flax models built on it, and ``train`` puts the parts together.
"""

__version__ = "0.1.0"
