"""Rule tables for the usual divisions of a transformer, with mesh axes as arguments.

The logical names are those of ``jdml.models``: ``batch`` and ``seq`` of activations; ``embed``,
``mlp``, ``heads``, ``kv_heads``, ``head_dim``, ``vocab`` of parameters and activations; ``experts``
of a mixture's parameters; ``layers`` for the dim that stacked layers add. Names of your own go in
by ``rules.replace(name=axis)``.

An axis argument may be a tuple of axes, or None.
"""

from jdml.sharding.rules import Axis, Rules, entry_of


def data_parallel(data: Axis = "data") -> Rules:
    """Every worker has the whole model; only the batch is divided."""
    return _rules(batch=data)


def fsdp(data: Axis = "data", fsdp: Axis = "fsdp") -> Rules:
    """ZeRO-3: parameters and batch divided over ``fsdp``, gathered layer by layer.

    The batch is divided over ``data`` too, where copies of the divided model sit.
    """
    return _rules(batch=_join(data, fsdp), embed=fsdp).for_activations(embed=None)


def tensor(data: Axis = "data", model: Axis = "model") -> Rules:
    """Megatron: heads, hidden units and vocabulary divided over ``model``.

    Each layer of ``jdml.models.Transformer`` then sums an activation over ``model`` twice forward
    and twice backward: an all-reduce of ``batch · seq · embed`` elements.

    Reference: Shoeybi et al., "Megatron-LM", 2019.
    """
    return _rules(batch=data, mlp=model, heads=model, kv_heads=model, vocab=model)


def fsdp_tensor(data: Axis = "data", fsdp: Axis = "fsdp", model: Axis = "model") -> Rules:
    """Both: each weight divided over ``fsdp`` along ``embed`` and over ``model`` along the rest."""
    rules = tensor(_join(data, fsdp), model).replace(embed=fsdp)
    return rules.for_activations(embed=None)


def sequence_parallel(rules: Rules, model: Axis = "model") -> Rules:
    """The rules with activations between the divided layers split along ``seq`` over ``model``.

    Each all-reduce of a layer becomes a reduce-scatter, and an all-gather before the next product.
    This is for activations whose other dims stay whole (``batch, seq, embed``). Where ``model``
    divides another dim (``mlp``, ``heads``), name the positions ``Without("seq", "mlp")`` in
    ``constrain``, or the axis would be used twice. With ``jdml.models.Transformer`` set
    ``flatten_tokens=False``.

    Reference: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
    2022.
    """
    return rules.for_activations(seq=model)


def expert_parallel(rules: Rules, expert: Axis = "expert") -> Rules:
    """The rules with a mixture's experts divided over ``expert``, and the batch over it too.

    A device holds some experts and some samples, whose tokens travel to their experts and back.
    """
    return rules.replace(experts=expert, batch=_join(rules.axis("batch"), expert))


_NAMES = (
    "batch",
    "seq",
    "embed",
    "mlp",
    "heads",
    "kv_heads",
    "head_dim",
    "vocab",
    "experts",
    "layers",
)


def _rules(**axes: Axis) -> Rules:
    return Rules(*((name, axes.get(name)) for name in _NAMES))


def _join(*axes: Axis) -> Axis:
    parts: list[str] = []
    for axis in axes:
        parts += [] if axis is None else [axis] if isinstance(axis, str) else list(axis)
    return entry_of(parts)
