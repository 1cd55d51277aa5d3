"""What a chip holds of each parameter: shapes and specs of the model itself, nothing made."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jdml.models import Transformer, TransformerConfig
from jdml.plan.layout import Layout
from jdml.sharding import Rules, presets, specs
from jdml.sharding.fit import axes_of
from jdml.sharding.paths import leaves_with_paths


@dataclass(frozen=True)
class Share:
    """Of one parameter.

    Attributes:
      path: Of the leaf: ``layers/mlp/gate/kernel``.
      elements: That one chip holds, of all its layers together.
      axes: Mesh axes longer than 1 that divide it.
      stacked: One for each layer, under a leading dim; ``stage`` divides these alone.
    """

    path: str
    elements: int
    axes: tuple[str, ...]
    stacked: bool


def rules_of(layout: Layout) -> Rules:
    """FSDP × tensor × context × expert parallel, over the axes that the layout's mesh has."""
    rules = presets.fsdp_tensor()
    if layout.expert > 1:
        rules = presets.expert_parallel(rules)
    if layout.seq > 1:
        rules = rules.replace(seq="seq")
    return rules.replace(vocab=None) if layout.stage > 1 else rules


@functools.lru_cache(maxsize=8)
def abstract_model(config: TransformerConfig) -> tuple[Any, Any]:
    """``(graphdef, state)`` of the model, shapes only."""
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def shares(config: TransformerConfig, layout: Layout) -> tuple[Share, ...]:
    """Of every parameter, in the model's order."""
    # Layouts that differ in other things divide parameters alike.
    return _shares(
        config,
        Layout(fsdp=layout.fsdp, model=layout.model, stage=layout.stage, expert=layout.expert),
    )


@functools.lru_cache(maxsize=512)
def _shares(config: TransformerConfig, layout: Layout) -> tuple[Share, ...]:
    sizes = layout.sizes
    mesh = AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    _, state = abstract_model(config)
    placed = specs(state, mesh, rules_of(layout))
    found = []
    leaves = zip(leaves_with_paths(nnx.to_pure_dict(state)), jax.tree.leaves(placed), strict=True)
    for (path, leaf), spec in leaves:
        stacked = path.startswith("layers")
        axes = tuple(a for entry in spec for a in axes_of(entry) if sizes[a] > 1)
        axes += ("stage",) if stacked and layout.stage > 1 else ()
        parts = math.prod(sizes[a] for a in axes)
        found.append(Share(path, math.prod(leaf.shape) // parts, axes, stacked))
    return tuple(found)
