"""The mean of what several models say, over a mesh axis or over a dim of an array."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Axis = str | tuple[str, ...] | int
"""Mesh axis or axes (inside a ``shard_map``), or the dim of an array along which models stand."""
Of = Literal["outputs", "probabilities", "log_probabilities"]
Stacked = jax.Array | Sequence[jax.Array]


def ensemble(
    outputs: Stacked, axis: Axis, of: Of = "outputs", weights: jax.Array | None = None
) -> jax.Array:
    """The weighted mean of the models' outputs: ``sum_k w_k o_k / sum_k w_k``.

    For a loss convex in the outputs it is no worse than the models are on average (Jensen):
    ``L(mean_k o_k) <= mean_k L(o_k)``. Cross-entropy is convex in probabilities and in logits.

    Args:
      outputs: Floats. With a mesh axis: this worker's, inside a ``shard_map`` in which the axis is
        manual. With an int: all models' in one array, model k at index k of dim ``axis``; or, with
        ``axis=0``, a list with one array per model.
      axis: A mesh axis, a tuple of them, or an int.
      of: What the mean is taken of. ``"outputs"``: as they are. ``"probabilities"``: of the softmax
        over the last dim (outputs are logits); gives probabilities. ``"log_probabilities"``: of
        the log-softmax over the last dim, normalised again; gives log-probabilities, those of the
        models' geometric mean.
      weights: Not negative, not all zero. With a mesh axis this worker's, a scalar; with an int one
        per model, ``[num_models]``. A model of weight 0 is left out, whatever it says.

    Returns:
      The mean in the dtype of ``outputs``, added up in f32; the same on every worker. A value that
      is not finite in one model's output shows in the mean.

    Raises:
      ValueError: the models' outputs differ in shape; they are not floating; ``weights`` do not
        fit; the axis is not bound.

    Bytes each of K workers sends: one f32 all-reduce, ``2 (K-1)/K 4d`` for d outputs, and one of a
    single number with weights.

    Reference: Hansen & Salamon, "Neural Network Ensembles", 1990 (mean of outputs); Heskes,
    "Selecting Weighting Factors in Logarithmic Opinion Pools", 1998 (of log-probabilities).
    """
    if of not in get_args(Of):
        raise ValueError(f"ensemble: of={of!r} is not one of {get_args(Of)}.")
    models = gather_models(outputs, axis, "ensemble")
    if not jnp.issubdtype(models.values.dtype, jnp.floating):
        raise ValueError(
            f"ensemble: outputs have dtype {models.values.dtype}; expected floats. Labels are "
            "combined by vote."
        )
    if of != "outputs":
        models.check_classes(f"ensemble(of={of!r})")
    answers = answer(models.values, of)
    if weights is None:
        mean = models.sum(answers) / models.number
    else:
        w = models.weights(weights, answers, "ensemble")
        mean = models.sum(jnp.where(w == 0, 0, w * answers)) / models.sum(w)
    return settle(mean, of).astype(models.values.dtype)


def answer(outputs: jax.Array, of: Of) -> jax.Array:
    """What one model puts into the mean, in f32 or wider."""
    wide = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    if of == "probabilities":
        return jax.nn.softmax(wide, axis=-1)
    return jax.nn.log_softmax(wide, axis=-1) if of == "log_probabilities" else wide


def settle(mean: jax.Array, of: Of) -> jax.Array:
    """The ensemble's answer, given the mean of :func:`answer`."""
    return jax.nn.log_softmax(mean, axis=-1) if of == "log_probabilities" else mean


class Models(NamedTuple):
    """What the models say.

    Attributes:
      values: All models', stacked along dim 0; or this worker's, where ``axis`` is given.
      axis: The mesh axes over which the others stand; ``None`` if all are in ``values``.
    """

    values: jax.Array
    axis: tuple[str, ...] | None

    @property
    def number(self) -> int:
        """How many there are."""
        return self.values.shape[0] if self.axis is None else int(jax.lax.axis_size(self.axis))

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the models of an array that stands as ``values`` do."""
        return jnp.sum(x, axis=0) if self.axis is None else jax.lax.psum(x, self.axis)

    def check_classes(self, caller: str) -> None:
        """There is a last dim for the classes beside that of the models."""
        if self.values.ndim < (2 if self.axis is None else 1):
            raise ValueError(
                f"{caller}: outputs of shape {self.values.shape} have no dim of classes; it is the "
                "last one, beside that of the models."
            )

    def weights(self, weights: jax.Array, like: jax.Array, caller: str) -> jax.Array:
        """One weight per model, in the dtype of ``like`` and a shape that broadcasts over it."""
        weights = jnp.asarray(weights)
        wanted = () if self.axis else self.values.shape[:1]
        if weights.shape != wanted:
            what = "this worker's, a scalar" if self.axis else "one per model"
            raise ValueError(
                f"{caller}: weights of shape {weights.shape}; expected {wanted}, {what}."
            )
        if not isinstance(weights, jax.core.Tracer):
            numbers = np.asarray(weights, np.float64)
            if not np.isfinite(numbers).all() or (numbers < 0).any() or not numbers.any():
                raise ValueError(
                    f"{caller}: weights={numbers.tolist()}; expected finite numbers, none "
                    "negative, not all zero."
                )
        return weights.reshape(wanted + (1,) * (like.ndim - len(wanted))).astype(like.dtype)


def gather_models(outputs: Stacked, axis: Axis, caller: str) -> Models:
    """Finds the models in what a caller of ``ensemble`` or ``vote`` gave.

    Raises:
      ValueError: models' shapes or dtypes differ, ``axis`` names no dim of the array, or it is not
        bound.
    """
    if isinstance(axis, bool) or not isinstance(axis, int):
        return _over_mesh(outputs, axis, caller)
    if isinstance(outputs, (list, tuple)):
        if not outputs or axis != 0:
            raise ValueError(
                f"{caller}: a list of {len(outputs)} models' outputs and axis={axis}; expected at "
                "least one model, and axis=0."
            )
        arrays = [jnp.asarray(x) for x in outputs]
        for k, x in enumerate(arrays):
            if (x.shape, x.dtype) != (arrays[0].shape, arrays[0].dtype):
                raise ValueError(
                    f"{caller}: model {k} gives {x.dtype}{list(x.shape)}, model 0 "
                    f"{arrays[0].dtype}{list(arrays[0].shape)}. All must answer the same samples "
                    "with outputs of one shape; bring them to a common set of classes first."
                )
        return Models(jnp.stack(arrays), None)
    array = jnp.asarray(outputs)
    if not -array.ndim <= axis < array.ndim or not array.shape[axis]:
        raise ValueError(
            f"{caller}: axis={axis}, but the outputs have shape {array.shape}; expected the dim "
            "along which at least one model stands."
        )
    return Models(jnp.moveaxis(array, axis, 0), None)


def _over_mesh(outputs: Stacked, axis: Axis, caller: str) -> Models:
    names = (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not names or not all(isinstance(a, str) for a in names):
        raise ValueError(
            f"{caller}: axis={axis!r}; expected a mesh axis, a tuple of mesh axes, or the number "
            "of the dim along which the models are stacked."
        )
    if isinstance(outputs, (list, tuple)):
        raise ValueError(
            f"{caller}: a {type(outputs).__name__} of outputs over mesh axis {axis!r}, where each "
            "worker gives one array. A list, one array per model, goes with axis=0."
        )
    try:
        jax.lax.axis_size(names)
    except NameError as error:
        raise ValueError(
            f"{caller}: mesh axis {axis!r} is not bound here. Call it inside a jax.shard_map over "
            "a mesh that has it, or stack the models' outputs and give the number of that dim."
        ) from error
    return Models(jnp.asarray(outputs), names)
