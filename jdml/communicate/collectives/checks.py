"""What every collective refuses, before it is traced."""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.payloads import Axis
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Content = Codec | ErrorFeedback | Reducer | None
"""What workers may say to each other: everything, codes, codes with their error fed back, …"""


def check_names(name: str, axis: Axis) -> None:
    """Raises unless ``axis`` is a name or a tuple of different names."""
    names = (axis,) if isinstance(axis, str) else axis
    if (
        not isinstance(names, tuple)
        or not names
        or not all(isinstance(a, str) for a in names)
        or len(set(names)) < len(names)
    ):
        raise ValueError(
            f"{name}: axis={axis!r}; expected the name of a mesh axis, or a tuple of different "
            "names."
        )


def check_content(name: str, codec: Content, *, reducers: bool) -> None:
    """Raises unless ``codec`` is one, and one that this collective can use."""
    if not (codec is None or isinstance(codec, (Codec, ErrorFeedback, Reducer))):
        raise ValueError(
            f"{name}: codec={codec!r} is not a codec. Expected None, a codec such as int8(), or "
            "error_feedback(int8()); did you forget to call the factory?"
        )
    if isinstance(codec, Reducer) and not reducers:
        raise ValueError(
            f"{name}: {codec} takes means of its own and has no payload for one worker to send to "
            f"another. Use a codec here, such as int8(); all_reduce_mean takes {codec}."
        )


def check_call(
    name: str,
    x: PyTree,
    axis: Axis,
    codec: Content,
    key: jax.Array | None,
    residual: PyTree | None,
) -> int:
    """Raises on what cannot work; returns the number of workers."""
    for path, leaf in leaves_with_paths(x):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name}: leaf {path!r} has dtype {dtype}; expected floating point. Cast it, or "
                "leave it out of the tree."
            )
    inner = codec.codec if isinstance(codec, ErrorFeedback) else codec
    if inner is not None and inner.needs_key and key is None:
        raise ValueError(
            f"{name}: {inner} draws random numbers; pass key=, the same on every worker and "
            "different each step."
        )
    if isinstance(codec, ErrorFeedback):
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
        if residual is None or [jnp.shape(e) for e in jax.tree.leaves(residual)] != shapes:
            raise ValueError(
                f"{name}: error feedback needs residual=, f32 and shaped like x; start from zeros "
                "and pass the returned residual to the next round."
            )
    elif residual is not None and not isinstance(codec, Reducer):
        raise ValueError(f"{name}: residual= is used only with codec=error_feedback(...).")
    try:
        return int(jax.lax.axis_size(axis))
    except NameError as error:
        raise ValueError(
            f"{name}: axis {axis!r} is not bound here. Call it inside a jax.shard_map over a mesh "
            f"with the axis {axis!r}."
        ) from error
