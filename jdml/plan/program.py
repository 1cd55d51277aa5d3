"""The training step compiled ahead of time for the real chips, and what it holds and sends.

libtpu compiles for slices that are not there. What it says is the truth: it is what would run.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import TransformerConfig, pipeline_parts, training_loss
from jdml.partition.pipeline import pipeline
from jdml.plan.algorithm import Algorithm
from jdml.plan.layout import Layout, divided_config, schedule_of
from jdml.plan.memory import Memory
from jdml.plan.shares import abstract_model, rules_of
from jdml.plan.ticks import ticks_of
from jdml.plan.topology import Topology
from jdml.sharding import Collective, collectives, make_mesh, program_flops, specs
from jdml.train import make_step

PyTree = Any

INSTALL = "pip install 'jdml[tpu]' (x86-64 Linux; no TPU is needed to compile)"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as the compiler left it, for one chip.

    Attributes:
      memory: In its classes.
      listed: Its collectives.
      flops: Of its matrix products; in a pipeline as if every tick ran its longest operation.
      seconds: That compiling took.
      cpu_seconds: The same, of all processors together: what others did meanwhile is not in it.
      layout: The mesh.
    """

    memory: Memory
    listed: tuple[Collective, ...]
    flops: int
    seconds: float
    cpu_seconds: float
    layout: Layout

    def runs(self, one: Collective) -> float:
        """How often a collective runs in a step, as the text tells.

        In a pipeline each operation of a stage has its ticks, and so has handing on; what the ends
        do alone counts as if a stage were both. Rows of experts find room in the first round.
        """
        times = float(one.count or 1)
        if ("experts_overflow", 1) in one.branches:
            return 0.0
        if self.layout.stage == 1:
            return times
        ticks = ticks_of(self.layout)
        share = {"sends": (ticks.forward + ticks.back) / 2}
        for name, branch in one.branches:
            ran = ticks.runs(branch) if name == "stage" else share.get(name, ticks.number)
            times *= ran / ticks.number
        return times


class DoesNotFit(ValueError):
    """The compiler found no room; the message is its own.

    Attributes:
      missing: Bytes by which the program is too large for the chip, where the compiler says it.
    """

    def __init__(self, message: str, missing: int | None) -> None:
        super().__init__(message)
        self.missing = missing

    def __reduce__(self) -> Any:
        return DoesNotFit, (str(self), self.missing)


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def tpu_mesh(topology: Topology, layout: Layout) -> Mesh:
    """Of chips that need not be there; ``data`` crosses slices.

    Raises:
      ValueError: GPUs, or libtpu is not installed, or does not know the topology.
    """
    if not topology.is_tpu or not has_libtpu():
        what = "libtpu is not installed" if topology.is_tpu else "GPUs cannot be described"
        raise ValueError(f"cannot compile for {topology} here: {what}. For TPUs: {INSTALL}")
    from jax.experimental import topologies

    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    several = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    try:
        described = topologies.get_topology_desc(topology.slice_name, platform="tpu", **several)
    except Exception as error:
        raise ValueError(f"libtpu does not know {topology}: {error}") from error
    crossing = layout.crossing(topology)
    return make_mesh(layout.sizes, dcn=crossing, devices=described.devices)


def lower_step(
    config: TransformerConfig,
    layout: Layout,
    mesh: Mesh,
    batch: int,
    seq: int,
    algorithm: Algorithm,
) -> tuple[Any, Any]:
    """``(lowered step, abstract state)`` of training with AdamW; nothing is made.

    Args:
      config: The model.
      layout: How it is divided.
      mesh: With the axes of ``layout.sizes``.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
      algorithm: What the workers exchange.
    """
    graphdef, abstract = abstract_model(divided_config(config, layout))
    rules = rules_of(layout)
    params = nnx.to_pure_dict(abstract)
    param_specs = nnx.to_pure_dict(specs(abstract, mesh, rules))

    def whole(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
        model = nnx.merge(graphdef, params)
        return training_loss(model, batch["inputs"], batch["targets"])

    loss_fn: Any = whole
    if layout.stage > 1:
        pipe = pipeline(
            *pipeline_parts(nnx.merge(graphdef, abstract)),
            mesh,
            num_layers=config.num_layers,
            micro_batches=layout.micro_batches,
            schedule=schedule_of(layout.schedule),
        )
        loss_fn, param_specs = pipe, pipe.specs(param_specs)
        params = jax.eval_shape(pipe.arrange, params)
    inside = tuple(axis for axis in ("fsdp", "expert") if axis in mesh.axis_names)
    init, step = make_step(
        loss_fn,
        algorithm.chain(optax.adamw(3e-4)),
        mesh,
        specs=param_specs,
        rules=rules,
        batch_axes=inside,
    )
    state = init.abstract(params)
    placed = NamedSharding(mesh, P(("data", *inside), "seq" if layout.seq > 1 else None))
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32, sharding=placed)
    return step.lower(state, {"inputs": tokens, "targets": tokens}), state


def compile_step(
    config: TransformerConfig,
    layout: Layout,
    mesh: Mesh,
    batch: int,
    seq: int,
    algorithm: Algorithm,
) -> Compiled:
    """Compiles a step for the mesh's chips and reads off what it holds and sends.

    Raises:
      DoesNotFit: the compiler found no room for it.
    """
    lowered, state = lower_step(config, layout, mesh, batch, seq, algorithm)
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _does_not_fit(str(error)) from error
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Compiled(
        read_memory(program, state, config, layout),
        tuple(collectives(program, mesh)),
        program_flops(program),
        seconds,
        cpu_seconds,
        layout,
    )


def read_memory(program: Any, state: Any, config: TransformerConfig, layout: Layout) -> Memory:
    """What a compiled step holds on one chip, in its classes.

    Parameters and optimiser are what the arguments hold. What the loop over the layers carries from
    the forward to the backward pass are the activations (in a pipeline, what the loop over ticks
    keeps between the two in slots); the gradients are counted as f32, whole; all else that the
    program allocates is temporary.
    """
    sizes = program.memory_analysis()
    parameters, everything = _held(state.params), _held(state)
    gradients = sum(4 * _shard(x) // x.dtype.itemsize for x in jax.tree.leaves(state.params))
    stacked = {
        math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params) if x.ndim
    }
    lead: tuple[int, ...] = (config.num_layers,)
    if layout.stage > 1:
        ticks = ticks_of(layout)
        lead = (ticks.slots["kept"], config.num_layers // layout.stage // ticks.chunks)
    activations = _carried(program.as_text(), lead, stacked)
    allocated = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    inputs = sizes.argument_size_in_bytes - everything
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimiser=everything - parameters,
        activations=activations,
        temporaries=allocated + inputs - gradients - activations,
    )


def _shard(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _held(tree: PyTree) -> int:
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(_shard(x) for x in leaves)


def _carried(text: str, lead: tuple[int, ...], parameters: set[int]) -> int:
    """Bytes of what a loop of the entry carries under these leading dims, and is no parameter.

    Parameters are told by their size, so activations as large as one of them would be left out.
    """
    entry = text[text.index("\nENTRY") :]
    largest = 0
    for line in entry.splitlines():
        head, loop, _ = line.partition(" while(")
        if loop:
            total = 0
            for dtype, dims, place in re.findall(r"(bf16|f32)\[([\d,]+)\](\{\S*\})?", head):
                shape = [int(d) for d in dims.split(",")]
                if "S(1)" in place:
                    continue  # in the scratch memory
                if tuple(shape[: len(lead)]) == lead and math.prod(shape) not in parameters:
                    total += math.prod(shape) * (2 if dtype == "bf16" else 4)
            largest = max(largest, total)
    return largest


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _does_not_fit(message: str) -> DoesNotFit:
    match = re.search(r"Exceeded hbm capacity by ([\d.]+)([KMGT]?)", message)
    missing = None if match is None else int(float(match[1]) * _UNITS[match[2]])
    return DoesNotFit(message.split("\n")[0], missing)
