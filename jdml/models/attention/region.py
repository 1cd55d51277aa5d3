"""``shard_map`` under the current rules, where the gradient is stated and not derived.

``jdml.sharding.region.manual`` lets JAX derive gradients, for which it checks what varies over
which axis. Here a ``custom_vjp`` goes around two such regions instead, one for each pass: a ring
in a loop under ``vmap`` (workers mapped with ``spmd_axis_name``) does not pass those checks in jax
0.10 to 0.12, because a permutation's type forgets the mapped axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jdml.sharding.constrain import current_context, manual_axes, without
from jdml.sharding.fit import fit, num_parts
from jdml.sharding.rules import OnIndivisible, Rules


class Region(NamedTuple):
    """The mesh and the rules around a call; made by ``region``.

    Attributes:
      mesh: the mesh.
      rules: as activations see them.
      mapped: axes that are manual already, or mapped by a ``vmap`` (``use_rules(hide=...)``).
      manual: the former of them.
    """

    mesh: Mesh
    rules: Rules
    mapped: frozenset[str]
    manual: frozenset[str]

    def spec(self, where: str, *names: Any) -> P:
        """The spec of an array whose dims have these names, axes that are mapped left out.

        Args:
          where: begins the message of an error.
          *names: as in ``constrain``.
        """
        try:
            spec = self.rules.spec(names, self.mesh.axis_names)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return without(spec, self.mapped)

    def fit(self, where: str, shape: tuple[int, ...], spec: P) -> P:
        """The spec, if its axes divide the dims; under ``"replicate"`` those that do not, whole."""
        replicates = self.rules.on_indivisible == "replicate"
        policy: OnIndivisible = "replicate" if replicates else "error"
        return fit(where, shape, spec, self.mesh, policy)

    def num_parts(self, entry: Any) -> int:
        """Into how many parts an entry of a spec divides its dim."""
        return num_parts(entry, self.mesh)

    def run(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """``f`` on each device's shards, manual over all axes of the mesh.

        An output that a spec says to be whole along an axis must be equal there.
        """
        free = set(self.mesh.axis_names) - self.manual
        if not free:
            return f
        # Inside a manual region the mesh is the surrounding one.
        mesh = None if self.manual else self.mesh
        return jax.shard_map(
            f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False
        )


def region(where: str) -> Region | None:
    """The mesh and rules that ``use_rules`` set; None inside ``no_mesh``.

    Raises:
      ValueError: outside both, beginning with ``where``.
    """
    mesh, rules, hide, _ = current_context(where)
    if mesh is None:
        return None
    manual = manual_axes()
    return Region(mesh, rules, hide | manual, manual)
