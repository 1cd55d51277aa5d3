"""What most models say, over a mesh axis or over a dim of an array."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jdml.aggregate.ensemble import Axis, Models, Stacked, gather_models

Ties = Literal["lowest", "outputs", "random", "abstain"]
ABSTAIN = -1
"""The label of a model that does not vote, and of an election without a winner."""

# Sums of the same f32 weights in another order differ by less than this part of their total.
_TIED = 1e-6


def vote(
    votes: Stacked,
    axis: Axis,
    num_classes: int | None = None,
    weights: jax.Array | None = None,
    ties: Ties = "lowest",
    key: jax.Array | None = None,
) -> jax.Array:
    """The label with the most votes: ``argmax_c sum_k w_k [y_k = c]``.

    Args:
      votes: Labels, integers ``[...]``, or logits, floats ``[..., num_classes]``, of which the
        largest is the vote (the first of several). With a mesh axis: this worker's, inside a
        ``shard_map`` in which the axis is manual. With an int: all models', model k at index k of
        dim ``axis``; or, with ``axis=0``, a list with one array per model. A label outside
        ``0 .. num_classes - 1`` is no vote, and logits that hold a NaN are none either.
      axis: A mesh axis, a tuple of them, or an int.
      num_classes: Number of labels; needed with labels, read off the shape of logits.
      weights: Of each model's vote, not negative, not all zero. With a mesh axis this worker's, a
        scalar; with an int one per model, ``[num_models]``. Alike by default: the plurality wins.
      ties: What happens when several labels lead (totals closer than 1e-6 of all weight are equal):
        ``"lowest"``: the smallest of them. ``"outputs"``: of them, the one with the largest mean
        probability (under the same weights; needs logits), then the smallest. ``"random"``: one
        of them, each as likely, drawn with ``key``. ``"abstain"``: -1.
      key: PRNG key for ``ties="random"``, the same on every worker.

    Returns:
      int32 ``[...]``; -1 where nobody voted. The same on every worker.

    Raises:
      ValueError: the models' votes differ in shape; an argument is missing or does not fit; the
        axis is not bound.

    Bytes each of K workers sends, d votes among C labels: one f32 all-reduce of ``d C`` totals,
    ``2 (K-1)/K 4 d C``; twice that with ``ties="outputs"``; and one of a single number with
    weights.

    Reference: Hansen & Salamon, "Neural Network Ensembles", 1990 (plurality); Littlestone &
    Warmuth, "The Weighted Majority Algorithm", 1994.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"vote: ties={ties!r} is not one of {get_args(Ties)}.")
    if ties == "random" and key is None:
        raise ValueError(
            "vote(ties='random') draws: pass key=jax.random.key(...), the same on every worker."
        )
    models = gather_models(votes, axis, "vote")
    says = _ballots(models, num_classes, ties)
    everyone: jax.Array | int = models.number
    if weights is not None:
        w = models.weights(weights, says, "vote")
        says = w * says
        everyone = models.sum(w)[..., 0] if ties == "outputs" else models.sum(w)
    totals = models.sum(says)
    tally, probability = (totals[..., 0], totals[..., 1]) if ties == "outputs" else (totals, None)

    most = jnp.max(tally, axis=-1, keepdims=True)
    leads = most - tally <= _TIED * everyone
    if ties == "abstain":
        alone = jnp.sum(leads, axis=-1) == 1
        winner = jnp.where(alone, jnp.argmax(leads, axis=-1), ABSTAIN)
    elif ties == "random":
        assert key is not None
        lots = jax.random.uniform(key, leads.shape, minval=1.0, maxval=2.0)
        winner = jnp.argmax(jnp.where(leads, lots, 0), axis=-1)
    elif probability is not None:
        winner = jnp.argmax(jnp.where(leads, probability, -1), axis=-1)
    else:
        winner = jnp.argmax(leads, axis=-1)  # the first that leads
    return jnp.where(most[..., 0] > 0, winner, ABSTAIN).astype(jnp.int32)


def _ballots(models: Models, num_classes: int | None, ties: Ties) -> jax.Array:
    """f32: 1 where a model's vote is, ``[..., C]``; with ``ties="outputs"`` ``[..., C, 2]``.

    The second of the two is the model's probability of the label.
    """
    values = models.values
    if jnp.issubdtype(values.dtype, jnp.floating):
        models.check_classes("vote (of logits)")
        if num_classes is not None and num_classes != values.shape[-1]:
            raise ValueError(
                f"vote: num_classes={num_classes}, but the logits have {values.shape[-1]} in "
                f"shape {values.shape}. Leave it out, or pass labels."
            )
        labels = jnp.argmax(values, axis=-1)
        valid = ~jnp.any(jnp.isnan(values), axis=-1, keepdims=True)
        ballots = jnp.where(valid, jax.nn.one_hot(labels, values.shape[-1], dtype=jnp.float32), 0)
        if ties != "outputs":
            return ballots
        probabilities = jax.nn.softmax(values.astype(jnp.float32), axis=-1)
        return jnp.stack([ballots, jnp.where(valid, probabilities, 0)], axis=-1)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(
            f"vote: votes have dtype {values.dtype}; expected integers (labels) or floats (logits)."
        )
    if ties == "outputs":
        raise ValueError("vote(ties='outputs') needs the models' logits, and got labels.")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(
            f"vote: num_classes={num_classes!r}; with labels expected an int >= 1, how many "
            "different labels there are."
        )
    return jax.nn.one_hot(values, num_classes, dtype=jnp.float32)
