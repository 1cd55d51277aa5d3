"""Mixtures of experts: of a layer's many networks, each token passes through a few.

Reading order: ``routing`` (which ones, and the losses that spread the tokens), ``dense`` (what the
result must be), ``capacity`` and ``dropless`` (how it is computed, on one device or with the
experts divided over a mesh axis), ``rows`` and ``products`` (their parts). The layer of the decoder
is ``jdml.models.transformer.experts``.
"""

from jdml.models.experts.capacity import capacity_of, evaluate_with_capacity, places
from jdml.models.experts.dense import evaluate_densely
from jdml.models.experts.dropless import evaluate_dropless
from jdml.models.experts.kernels import Kernels
from jdml.models.experts.routing import (
    Balance,
    Routing,
    balance_of,
    importance_loss,
    load_balance_loss,
    route,
    router_z_loss,
)

__all__ = [
    "Balance",
    "Kernels",
    "Routing",
    "balance_of",
    "capacity_of",
    "evaluate_densely",
    "evaluate_dropless",
    "evaluate_with_capacity",
    "importance_loss",
    "load_balance_loss",
    "places",
    "route",
    "router_z_loss",
]
