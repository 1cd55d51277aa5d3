"""Which layouts divide a model, a batch and the chips, and why others do not."""

import math
from collections.abc import Iterator

from jdml.models import TransformerConfig
from jdml.models.attention.blocks import block_size
from jdml.models.attention.order import check_divides
from jdml.models.transformer.config import DIVIDED
from jdml.plan.layout import AXES, Layout, divided_config, schedule_of
from jdml.plan.topology import Topology


def refusal(
    layout: Layout, config: TransformerConfig, topology: Topology, batch: int, seq: int
) -> str | None:
    """Why the layout cannot be, or None.

    Args:
      layout: The mesh.
      config: The model.
      topology: The chips.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
    """
    return (
        _chips(layout, topology)
        or _batch(layout, batch)
        or _weights(layout, config)
        or _experts(layout, config)
        or _stages(layout, config)
        or _sequence(layout, config, seq)
    )


def _chips(layout: Layout, topology: Topology) -> str | None:
    if layout.num_chips != topology.num_chips:
        return f"{layout} is {layout.num_chips} chips, {topology} has {topology.num_chips}"
    slices = topology.num_slices if topology.is_tpu else 1
    if layout.data % slices and layout.stage % slices:
        either = f" nor stage={layout.stage}" if layout.stage > 1 else ""
        return (
            f"data={layout.data}{either} does not divide over {slices} slices, and no other axis "
            "crosses them"
        )
    return None


def _batch(layout: Layout, batch: int) -> str | None:
    parts, names = layout.samples, "data × fsdp"
    if layout.expert > 1:
        names += " × expert"
    if batch % parts:
        return f"{names} = {parts} does not divide the batch, {batch}"
    if layout.micro_batches < 1 or (layout.stage == 1 and layout.micro_batches > 1):
        return (
            f"micro_batches={layout.micro_batches}: expected 1 without a pipeline (stage=1), and "
            "at least as many as stages with one"
        )
    here = batch // parts
    if here % layout.micro_batches:
        near = max(m for m in range(1, layout.micro_batches) if here % m == 0)
        return (
            f"micro_batches={layout.micro_batches} do not divide the {here} samples of each part "
            f"({batch} over {names} = {parts}); the next fewer that do: {near}"
        )
    return None


def _weights(layout: Layout, config: TransformerConfig) -> str | None:
    if config.embed_dim % layout.fsdp:
        return f"fsdp={layout.fsdp} does not divide embed_dim={config.embed_dim}"
    names = ["num_heads", "num_kv_heads", "mlp_dim"]
    if layout.stage == 1:  # whose tables' words are whole
        names.append("vocab_size")
    for name in names:
        if getattr(config, name) % layout.model:
            return f"model={layout.model} does not divide {name}={getattr(config, name)}"
    return None


def _experts(layout: Layout, config: TransformerConfig) -> str | None:
    if layout.expert == 1:
        return None
    if config.num_experts is None:
        return f"expert={layout.expert} needs a mixture of experts; this model has num_experts=None"
    if config.num_experts % layout.expert:
        sizes = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        return (
            f"expert={layout.expert} does not divide num_experts={config.num_experts}; sizes that "
            f"do: {', '.join(map(str, sizes))}"
        )
    return None


def _stages(layout: Layout, config: TransformerConfig) -> str | None:
    if layout.stage == 1:
        return None
    parts = layout.stage * layout.chunks
    if config.num_layers % parts:
        down = config.num_layers // parts * parts
        near = f"{down} or {down + parts}" if down else str(parts)
        return (
            f"stage={layout.stage} with {layout.chunks} chunks each does not divide num_layers="
            f"{config.num_layers}; the nearest that they divide: {near}"
        )
    try:
        schedule_of(layout.schedule).check(layout.stage, layout.micro_batches)
    except ValueError as error:
        return str(error)
    return None


def _sequence(layout: Layout, config: TransformerConfig, seq: int) -> str | None:
    config = divided_config(config, layout)
    if config.attention not in DIVIDED:
        return None
    try:
        check_divides(seq, layout.seq, config.seq_order)
        length, parts = seq // layout.seq, 2 if config.seq_order == "zigzag" else 1
        block_size(length // (parts if layout.seq > 1 else 1), config.attention_block)
    except ValueError as error:
        return f"seq={layout.seq}: {error}"
    heads = config.num_heads // layout.model
    if config.attention == "ulysses" and heads % layout.seq:
        return (
            f"attention='ulysses' divides the heads of a chip over seq={layout.seq}, which does "
            f"not divide {heads} (num_heads={config.num_heads}, model={layout.model}); take "
            "attention='ring'"
        )
    if layout.seq > 1 and config.num_experts is not None and config.capacity_factor is not None:
        return (
            f"seq={layout.seq} with capacity_factor={config.capacity_factor}, which counts the "
            "tokens of a whole sequence; take capacity_factor=None (dropless)"
        )
    return None


def layouts(
    config: TransformerConfig, topology: Topology, batch: int, seq: int, schedule: str = "1f1b"
) -> list[Layout]:
    """All that divide; a pipeline with every number of micro-batches that does.

    Args:
      config: The model.
      topology: The chips.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
      schedule: Of pipelines.

    Raises:
      ValueError: none does; says for each axis what stands in the way.
    """
    reasons: dict[str, None] = {}
    found = []
    for one in _meshes(config, topology.num_chips, batch, schedule):
        reason = refusal(one, config, topology, batch, seq)
        if reason is None:
            found.append(one)
        else:
            reasons[reason] = None
    if not found:
        # The most divided model leaves the batch the fewest parts.
        nearest = [r for r in reasons if "batch" in r] or list(reasons)
        most = _most_model(config, topology.num_chips)
        parts = topology.num_chips // most
        raise ValueError(
            f"no mesh of {topology.num_chips} chips divides a batch of {batch}: {nearest[-1]}. "
            f"The heads let model be at most {most}, so that without stages and parts of a "
            f"sequence data × fsdp is at least {parts}; take a batch that is a multiple of {parts}"
        )
    return found


def _most_model(config: TransformerConfig, num_chips: int) -> int:
    dims = (config.num_heads, config.num_kv_heads, config.mlp_dim, config.vocab_size)
    return math.gcd(*dims, num_chips)


def _meshes(
    config: TransformerConfig, num_chips: int, batch: int, schedule: str
) -> Iterator[Layout]:
    chunks = schedule_of(schedule).chunks
    most = {
        "model": math.gcd(config.num_heads, config.num_kv_heads, config.mlp_dim),
        "expert": config.num_experts or 1,
        "stage": config.num_layers // chunks,
    }
    for sizes in _products(num_chips, list(reversed(AXES)), most):
        mesh = Layout(**sizes, schedule=schedule)
        if mesh.stage == 1:
            yield mesh
            continue
        here = batch // mesh.samples
        numbers = [m for m in range(mesh.stage, here + 1) if here % m == 0]
        for number in numbers or [mesh.stage]:
            yield Layout(**sizes, schedule=schedule, micro_batches=number)


def _products(num_chips: int, axes: list[str], most: dict[str, int]) -> Iterator[dict[str, int]]:
    """Sizes of the axes that multiply to the chips; the last takes what is left."""
    if len(axes) == 1:
        yield {axes[0]: num_chips}
        return
    for size in range(1, min(num_chips, most.get(axes[0], num_chips)) + 1):
        if num_chips % size == 0:
            for rest in _products(num_chips // size, axes[1:], most):
                yield {axes[0]: size, **rest}
