"""Asked = obtained: compare requested layouts with those that arrays or a compiled step have.

XLA is free to choose layouts that nobody fixed, and JAX replicates what it is not told to divide;
both cost memory and time without a word. So ask once, after compiling.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import axes_of, fit, shape_of
from jdml.sharding.paths import as_pytree, broadcast_specs, leaves_with_paths

PyTree = Any

_MOST = 8  # wrong leaves that a message lists


def check(tree: PyTree, specs: PyTree, mesh: Mesh) -> None:
    """Raises unless every array lies on the mesh as its spec says.

    Args:
      tree: placed arrays, abstract arrays with a sharding, or an NNX module.
      specs: in the structure of the tree or a prefix of it; None means "not asked".
      mesh: the mesh.

    Raises:
      ValueError: naming each wrong leaf, the dim, the axis, and how to mend it.
    """
    tree = as_pytree(tree)
    leaves = [
        (path, shape_of(leaf), getattr(leaf, "sharding", None))
        for path, leaf in leaves_with_paths(tree)
    ]
    _compare(leaves, broadcast_specs(specs, tree), mesh, "shard(tree, mesh, specs) places them")


def check_compiled(
    compiled: jax.stages.Compiled, mesh: Mesh, inputs: PyTree = None, outputs: PyTree = None
) -> None:
    """Raises unless a compiled step takes and returns its arrays as the specs say.

    Args:
      compiled: ``jax.jit(step).lower(...).compile()``.
      mesh: the mesh.
      inputs: a tuple with the specs of each positional argument (parameters, optimiser state,
        batch, ...), each in the structure of the argument or a prefix; None means "not asked".
        Arguments that the program does not use have no layout and are passed over.
      outputs: the specs of the result, likewise.

    Raises:
      ValueError: as ``check``; paths begin with ``inputs/<position>`` or ``outputs``.
    """
    if inputs is not None:
        args, _ = compiled.args_info
        treedef: Any = jax.tree.structure(args)  # an unused argument's sharding is None
        obtained = treedef.flatten_up_to(compiled.input_shardings[0])
        leaves = [
            (f"inputs/{path}", tuple(leaf.shape), sharding)
            for (path, leaf), sharding in zip(leaves_with_paths(args), obtained, strict=True)
        ]
        asked = broadcast_specs(inputs, args, "inputs")
        used = [None if s is None else spec for spec, (_, _, s) in zip(asked, leaves, strict=True)]
        _compare(leaves, used, mesh, "pass in_shardings=shardings(specs, mesh) to jax.jit")
    if outputs is not None:
        result = compiled.out_info
        leaves = [
            ("outputs" if path == "<root>" else f"outputs/{path}", tuple(leaf.shape), sharding)
            for (path, leaf), sharding in zip(
                leaves_with_paths(result), jax.tree.leaves(compiled.output_shardings), strict=True
            )
        ]
        asked = broadcast_specs(outputs, result, "outputs")
        _compare(leaves, asked, mesh, "pass out_shardings=shardings(specs, mesh) to jax.jit")


def _compare(
    leaves: list[tuple[str, tuple[int, ...], Any]], asked: list[Any], mesh: Mesh, remedy: str
) -> None:
    wanted: dict[P, NamedSharding] = {}
    wrong: list[str] = []
    num_asked = 0
    for (path, shape, obtained), spec in zip(leaves, asked, strict=True):
        if spec is None:
            continue
        num_asked += 1
        fit(path, shape, spec, mesh)
        target = wanted.setdefault(spec, NamedSharding(mesh, spec))
        if not isinstance(obtained, Sharding):
            wrong.append(f"{path}: asked {spec}, but it is on the host, on no device")
        elif obtained != target and not obtained.is_equivalent_to(target, len(shape)):
            wrong.append(f"{path}: {_difference(shape, target, obtained)}")
    if wrong:
        more = f"\n  and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
        raise ValueError(
            f"{len(wrong)} of {num_asked} arrays do not lie as asked:\n  "
            + "\n  ".join(wrong[:_MOST])
            + f"{more}\nTo mend it: {remedy}; or ask for what was obtained."
        )


def _difference(shape: tuple[int, ...], asked: NamedSharding, obtained: Sharding) -> str:
    """Which dim differs, over which axis."""
    have = spec_text(obtained)
    want_shard, have_shard = asked.shard_shape(shape), obtained.shard_shape(shape)
    spec = asked.spec
    for dim, size in enumerate(shape):
        if want_shard[dim] == have_shard[dim]:
            continue
        axes = axes_of(spec[dim]) if dim < len(spec) else ()
        over = f"over axis {' × '.join(map(repr, axes))} in " if axes else ""
        return (
            f"dim {dim} of shape {shape}: asked {over}{_parts(size, want_shard[dim])}, obtained "
            f"{_parts(size, have_shard[dim])}; asked {spec}, obtained {have}"
        )
    if obtained.device_set != asked.device_set:
        return (
            f"shape {shape}: asked {spec} on {len(asked.device_set)} devices, obtained {have} on "
            f"{len(obtained.device_set)}"
        )
    return f"shape {shape}: asked {spec}, obtained {have}: same parts, on other devices"


def _parts(size: int, part: int) -> str:
    return "whole" if size == part else f"{-(-size // part)} parts"


def spec_text(sharding: Any) -> str:
    """A layout in a few characters."""
    if isinstance(sharding, NamedSharding):
        return str(sharding.spec)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return f"one device ({next(iter(sharding.device_set))})"
    return type(sharding).__name__
