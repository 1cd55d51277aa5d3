"""A part of a model written for one device: every mesh axis manual, operands divided by name.

    y = manual(on_device, [("batch", "seq", "embed"), ("experts", "embed", "mlp")],
               ("batch", "seq", "embed"))(x, kernels)

``constrain`` asks the partitioner for a layout and leaves the exchange to it. Where the exchange is
the algorithm (tokens that go to their experts, keys that go round a ring), ``on_device`` says it in
its own words, over ``axes_of_name("experts")``, and the rules in force say what it is given. A
parameter named ``Stored(("embed", "vocab"))`` comes as it is stored, for ``on_device`` to gather.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jdml.sharding.constrain import current_context, manual_axes, without
from jdml.sharding.fit import axes_of, fit

Names = tuple[Any, ...]


class Stored(tuple[Any, ...]):
    """Names of a parameter's dims, divided as parameters are, not as activations."""


def manual(
    function: Callable[..., Any], inputs: Iterable[Names], outputs: Names | list[Names]
) -> Callable[..., Any]:
    """``function`` on each device's part of its arguments, with every mesh axis manual.

    Axes that are manual already stay so, and their entries are dropped from the specs: the
    arguments are local along them. Axes hidden by ``use_rules(..., hide=...)``, over which a
    surrounding ``vmap`` maps, are manual and divide the mapped dim alone. Under ``no_mesh`` it is
    ``function`` itself. JAX's checks of what varies where are on, so that gradients come out right
    whatever is replicated.

    Args:
      function: takes and returns arrays; may name any axis of the mesh.
      inputs: logical names of each argument's dims, as ``constrain`` takes them, or ``Stored``.
      outputs: those of the result, an array; or a list, of each of several.

    Raises:
      ValueError: outside ``use_rules`` and ``no_mesh``; when called: another number of arguments
        or of dims, or a dim that its axes do not divide.
    """
    inputs = tuple(inputs)
    mesh, rules, hide, stored = current_context("manual")

    def call(*args: jax.Array) -> Any:
        if len(args) != len(inputs):
            raise ValueError(f"manual: {len(args)} arguments, but names for {len(inputs)}")
        if mesh is None:
            return function(*args)
        held = manual_axes()
        free = set(mesh.axis_names) - held
        # Along an axis of size 1 nothing varies, which types would say of what it divides.
        dropped = hide | held | {axis for axis, size in mesh.shape.items() if size == 1}

        def spec_of(names: Names) -> P:
            table = stored if isinstance(names, Stored) else rules
            return without(table.spec(names, mesh.axis_names), dropped)

        for number, (names, x) in enumerate(zip(inputs, args, strict=True)):
            where = f"manual: argument {number}, dims {names}"
            if len(names) != x.ndim:
                raise ValueError(f"{where}: expected {len(names)} dims, got shape {x.shape}")
            fit(where, x.shape, spec_of(names), mesh)
        if not free:
            return function(*args)
        return jax.shard_map(
            function,
            mesh=None if held else mesh,  # a nested region takes the mesh around it
            in_specs=tuple(spec_of(names) for names in inputs),
            out_specs=(
                tuple(map(spec_of, outputs)) if isinstance(outputs, list) else spec_of(outputs)
            ),
            axis_names=free,
        )(*args)

    return call


def axes_of_name(name: Any) -> tuple[str, ...]:
    """Mesh axes longer than 1 that divide activations' dims of this name under the current rules.

    Axes hidden by ``use_rules(..., hide=...)`` are left out; ``()`` under ``no_mesh``.
    """
    return _axes(name, stored=False)


def axes_of_stored(name: Any) -> tuple[str, ...]:
    """The same of parameters' dims."""
    return _axes(name, stored=True)


def _axes(name: Any, stored: bool) -> tuple[str, ...]:
    mesh, rules, hide, of_parameters = current_context("axes_of_name")
    if mesh is None:
        return ()
    spec = (of_parameters if stored else rules).spec((name,), mesh.axis_names)
    return tuple(a for a in axes_of(spec[0]) if a not in hide and mesh.shape[a] > 1)


def num_parts_of_name(name: Any) -> int:
    """Into how many parts :func:`axes_of_name` divides a dim."""
    mesh: Mesh | None = current_context("num_parts_of_name")[0]
    parts = 1
    for axis in axes_of_name(name):
        assert mesh is not None
        parts *= mesh.shape[axis]
    return parts


def platform() -> str:
    """``"cpu"``, ``"gpu"``, ``"tpu"``: what the mesh in force is made of, or JAX's default."""
    return first_device().platform


def first_device() -> Any:
    """The first device of the mesh in force, which need not be there; or JAX's first."""
    mesh = current_context("first_device")[0]
    return jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]


def memory_kinds() -> frozenset[str]:
    """Memories that a device of the mesh in force reaches: ``"device"``, ``"pinned_host"``, …."""
    return frozenset(memory.kind for memory in first_device().addressable_memories())


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each typed as varying over all axes over which one of them varies.

    JAX does so by itself between the operands of its own functions, but not for a ``custom_vjp`` or
    the carry of a loop. The transpose sums over the axes that were added.
    """
    axes = frozenset().union(*(varying_axes(x) for x in arrays))

    def widen(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(widen(x) for x in arrays)


def varying_axes(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Manual axes along which JAX's type of ``x`` says that it may differ.

    The one place that reads this young attribute. ``x`` may be what ``jax.eval_shape`` returns.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return frozenset(x.manual_axis_type.varying)
    return frozenset(jax.typeof(x).mat.varying)
