"""Pytrees of NumPy arrays as they travel between workers and server: encoded leaf by leaf.

Between processes a payload is host memory, so what is counted is ``nbytes`` of the arrays that are
sent, and not what a formula says of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Leaves = tuple[np.ndarray, ...]
"""The leaves of a pytree, read-only."""


class Parcel(NamedTuple):
    """A tree on its way.

    Attributes:
      content: The leaves themselves, or what the codec made of each.
      nbytes: Bytes of all arrays in it.
    """

    content: Any
    nbytes: int


class Format:
    """What a tree looks like, and how it is put on the wire and read off it."""

    def __init__(self, like: PyTree, codec: Codec | None) -> None:
        named = leaves_with_paths(like)
        self.treedef: Any = jax.tree.structure(like)
        self.paths = tuple(path for path, _ in named)
        self.shapes = tuple(np.shape(x) for _, x in named)
        self.dtypes = tuple(np.asarray(x).dtype for _, x in named)
        self.codec = codec
        if codec is not None:
            for path, dtype in zip(self.paths, self.dtypes, strict=True):
                if not jnp.issubdtype(dtype, jnp.floating):
                    raise ValueError(
                        f"leaf {path!r} has dtype {dtype}, and {codec} encodes floats only. Keep "
                        "integers out of what is trained, or exchange without a codec."
                    )

    def leaves(self, tree: PyTree, what: str) -> Leaves:
        """The leaves of a tree that must look like this one.

        Raises:
          ValueError: it does not; the first leaf that differs is named.
        """
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            got = {path for path, _ in leaves_with_paths(tree)}
            missing, extra = set(self.paths) - got, got - set(self.paths)
            raise ValueError(
                f"{what}: expected a tree like the parameters; missing: {sorted(missing) or '-'}, "
                f"not among them: {sorted(extra) or '-'}"
                + ("." if missing or extra else f"; containers differ: {treedef}.")
            )
        arrays = tuple([x if type(x) is np.ndarray else np.asarray(x) for x in leaves])
        if tuple([x.shape for x in arrays]) == self.shapes:
            return arrays
        for x, shape, path in zip(arrays, self.shapes, self.paths, strict=True):
            if x.shape != shape:
                raise ValueError(
                    f"{what}: leaf {path!r} has shape {x.shape}, the parameter has {shape}."
                )
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        # A treedef with nodes of a class of its own cannot be pickled; a tree can.
        state = self.__dict__.copy()
        treedef = state.pop("treedef")
        return state | {"like": jax.tree.unflatten(treedef, range(treedef.num_leaves))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.treedef = jax.tree.structure(self.__dict__.pop("like"))

    def checked(self, leaves: Sequence[np.ndarray]) -> Leaves:
        """Leaves that were saved, if they are like these.

        Raises:
          ValueError: their number, a shape or a dtype differs; the first such leaf is named.
        """
        if len(leaves) != len(self.paths):
            raise ValueError(
                f"restore: {len(leaves)} leaves were saved, and the parameters have "
                f"{len(self.paths)}: another model."
            )
        for x, path, shape, dtype in zip(leaves, self.paths, self.shapes, self.dtypes, strict=True):
            if (x.shape, x.dtype) != (shape, dtype):
                raise ValueError(
                    f"restore: leaf {path!r} was saved as {x.dtype}{list(x.shape)}, and is "
                    f"{dtype}{list(shape)} here: another model."
                )
        return tuple(leaves)

    def tree(self, leaves: Leaves) -> PyTree:
        return jax.tree.unflatten(self.treedef, leaves)

    def encode(self, leaves: Leaves, key: jax.Array | None = None) -> Parcel:
        """Puts leaves on the wire; without a codec as they are."""
        if self.codec is None:
            return Parcel(leaves, sum([x.nbytes for x in leaves]))
        content = jax.tree.map(np.asarray, _encoded(leaves, key, self.codec))
        return Parcel(content, sum(x.nbytes for x in jax.tree.leaves(content)))

    def decode(self, parcel: Parcel) -> Leaves:
        """What the receiver reads; in the dtypes that were encoded."""
        if self.codec is None:
            return parcel.content
        leaves = tuple(np.asarray(x) for x in _decoded(parcel.content, self.codec))
        for x in leaves:
            x.flags.writeable = False
        return leaves


@functools.partial(jax.jit, static_argnames="codec")
def _encoded(leaves: Any, key: jax.Array | None, codec: Codec) -> tuple[Any, ...]:
    keys: list[Any] = [key] * len(leaves)
    if key is not None:
        keys = list(jax.random.split(key, len(leaves)))
    return tuple(codec.encode(x, k) for x, k in zip(leaves, keys, strict=True))


@functools.partial(jax.jit, static_argnames="codec")
def _decoded(content: tuple[Any, ...], codec: Codec) -> tuple[jax.Array, ...]:
    return tuple(codec.decode(encoded) for encoded in content)


class Sender:
    """A worker's end: encodes its updates, and keeps what the codec failed to say, if asked to.

    ``p = u + e``; ``C(p)`` is sent; ``e <- p - C(p)``, finite values only.
    """

    def __init__(self, fmt: Format, feedback: bool, seed: int, worker: int) -> None:
        self._format, self._feedback = fmt, feedback
        self._key: jax.Array | None = None
        if fmt.codec is not None and fmt.codec.needs_key:
            self._key = jax.random.fold_in(jax.random.key(seed), worker)
        self.residual: Leaves | None = None

    def __call__(self, update: PyTree, seq: int) -> Parcel:
        leaves = self._format.leaves(update, "push")
        key = None if self._key is None else jax.random.fold_in(self._key, seq)
        if not self._feedback:
            return self._format.encode(leaves, key)
        if self.residual is not None:
            leaves = tuple(x + e for x, e in zip(leaves, self.residual, strict=True))
        parcel = self._format.encode(leaves, key)
        owed = (x - y for x, y in zip(leaves, self._format.decode(parcel), strict=True))
        self.residual = tuple(np.where(np.isfinite(e), e, np.zeros_like(e)) for e in owed)
        return parcel


def split_content(content: Any, where: str) -> tuple[Codec | None, bool]:
    """``(codec, feed the error back?)`` of what a caller passed for one direction.

    Raises:
      ValueError: it is no codec, or one that needs state which that end does not keep.
    """
    feedback = isinstance(content, ErrorFeedback)
    codec = content.codec if isinstance(content, ErrorFeedback) else content
    if isinstance(codec, Reducer):
        raise ValueError(
            f"{where}={content}: it takes means among workers that exchange in lockstep and keeps "
            "state from round to round, which a server has for none. Use a codec such as int8()."
        )
    if codec is not None and not isinstance(codec, Codec):
        raise ValueError(f"{where}={content!r}: expected None, or a codec such as int8().")
    if feedback and where == "pull":
        raise ValueError(
            f"pull={content}: the server would need a residual for every worker, and keeps none. "
            "Pass the codec alone; error_feedback goes with push, where the worker keeps it."
        )
    return codec, feedback


def empty_like(leaves: Leaves) -> Leaves:
    """Arrays of the same shapes and dtypes, of any content."""
    return tuple(np.empty_like(x) for x in leaves)


def frozen(x: Any) -> np.ndarray:
    """A read-only copy."""
    out = np.array(x)
    out.flags.writeable = False
    return out
