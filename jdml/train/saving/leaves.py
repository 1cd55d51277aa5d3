"""The leaves of a state by name, and what may be asked of them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdml.sharding.paths import leaves_with_paths

PyTree = Any


def by_path(tree: PyTree) -> dict[str, Any]:
    """``{path: leaf}``, in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: there are no leaves, or two of one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in leaves_with_paths(tree):
        if path in named:
            raise ValueError(
                f"two leaves of the state are called {path!r}; rename one, because a checkpoint "
                "tells leaves apart by their paths."
            )
        named[path] = leaf
    if not named:
        raise ValueError("the state has no leaves; there is nothing to save or restore.")
    return named


def kinds(named: Mapping[str, Any]) -> dict[str, Any]:
    """``{path: {"shape": [...], "dtype": "float32"}}``, as the record holds it."""
    return {p: {"shape": list(x.shape), "dtype": str(x.dtype)} for p, x in named.items()}


def as_recorded(kinds: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What :func:`kinds` says, as abstract leaves on this process's first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        path: jax.ShapeDtypeStruct(kind["shape"], _dtype(kind["dtype"]), sharding=sharding)
        for path, kind in kinds.items()
    }


_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def _dtype(name: str) -> Any:
    return jax.random.key(0, impl=_KEYS[name]).dtype if name in _KEYS else jnp.dtype(name)


def num_bytes(tree: PyTree) -> int:
    """Bytes of all global arrays, given as arrays or ``ShapeDtypeStruct``."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return total


def check_savable(named: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a leaf that is no array, or whose buffer was donated."""
    for path, leaf in named.items():
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            raise ValueError(
                f"leaf {path!r} of the state is a {type(leaf).__name__}, not a jax.Array; convert "
                "it (jnp.asarray), or put it into `data` if it is no part of the training state."
            )
        if leaf.is_deleted():
            raise ValueError(
                f"leaf {path!r} of the state was donated to a step and is gone; save the state "
                "that the step returned."
            )
        if not leaf.size and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"leaf {path!r} of the state is an empty array of keys, which cannot be saved; "
                "leave it out."
            )


def check_shardings(named: Mapping[str, Any]) -> None:
    """Checks that all leaves are laid out over one set of devices, as ``jax.jit`` will ask.

    Raises:
      ValueError: a leaf has no sharding, its shape does not fit, or it lies on other devices.
    """
    shardings: dict[str, jax.sharding.Sharding] = {}
    for path, leaf in named.items():
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.sharding.Sharding):
            raise ValueError(
                f"leaf {path!r} to restore has no sharding; give "
                "jax.ShapeDtypeStruct(shape, dtype, sharding=...) for every leaf."
            )
        try:
            sharding.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise ValueError(
                f"leaf {path!r} of shape {list(leaf.shape)} does not fit its sharding: {error}"
            ) from error
        other, first = next(iter(shardings.items()), (path, sharding))
        if sharding.device_set != first.device_set:
            raise ValueError(
                f"leaf {path!r} would be restored to {_devices(sharding)} but {other!r} to "
                f"{_devices(first)}, and no jitted step takes both; give every leaf a sharding "
                "over one mesh."
            )
        shardings[path] = sharding


def _devices(sharding: jax.sharding.Sharding) -> str:
    names = sorted(str(device) for device in sharding.device_set)
    return names[0] if len(names) == 1 else f"{len(names)} devices, {names[0]} .. {names[-1]}"
