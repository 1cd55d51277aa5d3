r"""What error feedback still owes, moved to another number of workers.

A debt is a leaf in a NamedTuple's field ``residual``, with one value per worker. Saved by K workers
and restored on K', worker j takes over those of the workers that fall to it:

.. math:: e'_j = \sum_{k \bmod K' = j} e_k

So nothing is lost, whatever K and K' are, and workers beyond K begin without a debt. A lone worker
owes nothing, and may keep its leaf without a worker dim.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jdml.sharding.fit import axes_of
from jdml.sharding.paths import path_str
from jdml.train.saving import leaves, record

PyTree = Any
ResidualPolicy = Literal["sum", "mean", "reset"]
"""What becomes of the residuals of a checkpoint; see ``Checkpointer.restore``."""

_FIELD = "residual"


class Counts(NamedTuple):
    """Numbers of workers that a leaf was saved by, and is to be restored on."""

    saved: int
    given: int


def check_policy(policy: str) -> None:
    """Raises ``ValueError`` for what is none."""
    if policy not in get_args(ResidualPolicy):
        raise ValueError(f"residual={policy!r}; expected one of {get_args(ResidualPolicy)}.")


def debts(tree: PyTree) -> frozenset[str]:
    """Paths of the leaves that are debts.

    A field of that name may hold a reducer's whole state, in which the debt is once more a field of
    that name and the rest is not.
    """
    fields: dict[str, str] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        ends = [i for i, entry in enumerate(path) if _is_field(entry)]
        if ends:
            fields[path_str(path)] = path_str(path[: ends[-1] + 1]) + "/"
    found = set(fields.values())
    outer = {f for f in found if any(g != f and g.startswith(f) for g in found)}
    return frozenset(path for path, field in fields.items() if field not in outer)


class Plan(NamedTuple):
    """How the leaves that are wanted come out of those that are saved.

    Attributes:
      asked: What to read: abstract leaves with shardings.
      moved: The debts to be moved, all by the same numbers.
      fresh: The debts that begin with zeros.
      policy: What becomes of the debts.
      refusal: Why the checkpoint cannot be restored, to follow its name; or ``None``.
    """

    asked: dict[str, Any]
    moved: dict[str, Counts]
    fresh: frozenset[str]
    policy: ResidualPolicy
    refusal: str | None


def plan(
    about: record.Json, wanted: Mapping[str, Any], owed: frozenset[str], policy: ResidualPolicy
) -> Plan:
    """Compares a checkpoint's record with what is wanted of it.

    Args:
      about: The record.
      wanted: ``{path: abstract leaf with a sharding}``.
      owed: From :func:`debts` of what is wanted.
      policy: What becomes of the debts.
    """
    saved, asked = about["leaves"], dict(wanted)
    if policy == "reset":
        saved = record.without(saved, {*about.get("residuals", ()), *owed})
        asked = record.without(asked, owed)
    differing = {p: c for p in asked if p in saved and (c := _counts(saved[p], asked[p]))}
    moved = {path: number for path, number in differing.items() if path in owed}
    if len(set(moved.values())) > 1:
        moved = {}  # of another model
    refusal = _refusal(saved, asked, differing, moved)
    for path, number in moved.items():
        asked[path] = _as_saved(wanted[path], tuple(saved[path]["shape"]), number)
    return Plan(asked, moved, owed - asked.keys(), policy, refusal)


def settle(
    arrays: Mapping[str, jax.Array], wanted: Mapping[str, Any], plan: Plan
) -> dict[str, jax.Array]:
    """The debts that were not read as they are wanted: moved, or zeros."""
    ours = sorted({*plan.moved, *plan.fresh})  # one order in every process: one program
    if not ours:
        return {}

    def make(debts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            path: share_out(debts[path], wanted[path].shape, plan.moved[path], plan.policy)
            if path in debts
            else jnp.zeros(wanted[path].shape, wanted[path].dtype)
            for path in ours
        }

    shardings = {path: wanted[path].sharding for path in ours}
    debts = {path: arrays[path] for path in plan.moved}
    return jax.block_until_ready(jax.jit(make, out_shardings=shardings)(debts))


def share_out(
    debt: jax.Array, shape: tuple[int, ...], number: Counts, policy: ResidualPolicy
) -> jax.Array:
    """One leaf, ``[K, ...]`` to ``[K', ...]``; sums in f32, or what is wider."""
    rest = shape if len(shape) < debt.ndim else shape[1:]
    rows = debt.astype(jnp.promote_types(debt.dtype, jnp.float32)).reshape(number.saved, *rest)
    missing = -number.saved % number.given
    rows = jnp.concatenate([rows, jnp.zeros((missing, *rest), rows.dtype)])
    shared = rows.reshape(-1, number.given, *rest).sum(axis=0)
    if policy == "mean":
        shared = shared * (number.given / number.saved)
    return shared.astype(debt.dtype).reshape(shape)


def _refusal(
    saved: record.Json,
    asked: Mapping[str, Any],
    differing: Mapping[str, Counts],
    moved: Mapping[str, Counts],
) -> str | None:
    differences = record.leaf_differences(
        record.without(saved, moved), leaves.kinds(record.without(asked, moved))
    )
    if not differences:
        return None
    if len(differences) == len(differing) - len(moved) and len(set(differing.values())) == 1:
        number = next(iter(differing.values()))
        return (
            f"was saved by {number.saved} workers, and {number.given} are here. Of what each "
            "worker has of its own, only the residuals of error feedback can be moved to another "
            f"number of workers, not:{record.listed(differences)}\nResume with {number.saved} "
            "workers. Or take the workers' mean model there (step.consensus(state)) and begin a "
            "run with it here."
        )
    return (
        f"is of another model:{record.listed(differences)}\nResume with the model that was saved, "
        "or start anew in another folder."
    )


def _counts(saved: Any, wanted: Any) -> Counts | None:
    """The numbers of workers, if they may be all that differs; ``None`` if not, or if equal."""
    old, new = tuple(saved["shape"]), tuple(wanted.shape)
    if old == new or saved["dtype"] != str(wanted.dtype):
        return None
    if len(old) == len(new) and old[1:] == new[1:]:
        one_each = wanted.sharding.shard_shape(new)[0] == 1  # else dim 0 is not the workers'
        return Counts(old[0], new[0]) if one_each else None
    if old[1:] == new:
        return Counts(old[0], 1)
    if old == new[1:]:
        return Counts(1, new[0])
    return None


def _as_saved(wanted: Any, shape: tuple[int, ...], number: Counts) -> jax.ShapeDtypeStruct:
    """What to read: the saved shape, on the same devices, divided as far as it can be."""
    sharding = _reading(wanted.sharding, shape, len(wanted.shape), number.saved)
    return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=sharding)


def _reading(sharding: Sharding, shape: tuple[int, ...], ndim: int, num_saved: int) -> Sharding:
    """Dim 0 over as many devices of the worker axes as divide it; the other dims as asked.

    The worker axes are cut in two, in place, so that the devices keep their order. In the devices'
    memory whatever is asked: there they are summed.
    """
    if not isinstance(sharding, NamedSharding):
        assert sharding.is_fully_replicated, sharding
        return sharding
    mesh = sharding.mesh
    entries = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    workers = () if ndim < len(shape) else axes_of(entries[0])
    others = entries if ndim < len(shape) else entries[1:]
    names, sizes, divided, left = [], [], [], num_saved
    for axis, size in mesh.shape.items():
        if axis not in workers:
            names.append(axis)
            sizes.append(size)
            continue
        part = math.gcd(left, size)
        left //= part
        names += [f"{axis}:divided", f"{axis}:whole"]
        sizes += [part, size // part]
        divided.append(f"{axis}:divided")
    cut = Mesh(
        mesh.devices.reshape(sizes), names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)
    )
    spec = others if len(shape) < ndim else (tuple(divided) or None, *others)
    return NamedSharding(cut, PartitionSpec(*spec))


def _is_field(entry: Any) -> bool:
    return isinstance(entry, jax.tree_util.GetAttrKey) and entry.name == _FIELD
