"""The mean of models' outputs: against NumPy, on meshes, and never worse than the models' mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax, softmax

from jdml.aggregate import ensemble
from jdml.sharding import bytes_per_axis, collectives, make_mesh

MODELS, SAMPLES, CLASSES = 4, 6, 5
LOGITS = 2 * np.random.default_rng(0).normal(size=(MODELS, SAMPLES, CLASSES)).astype(np.float32)
WEIGHTS = np.array([1, 0.5, 2, 0.25], np.float32)
OF = ("outputs", "probabilities", "log_probabilities")


def dense(logits, of, weights=None):
    """Along dim 0."""
    answers = {
        "outputs": lambda x: x,
        "probabilities": lambda x: softmax(x, axis=-1),
        "log_probabilities": lambda x: log_softmax(x, axis=-1),
    }[of](np.asarray(logits, np.float64))
    mean = np.average(answers, axis=0, weights=weights)
    return log_softmax(mean, axis=-1) if of == "log_probabilities" else mean


def over_mesh(f, shape, axis, *stacked):
    """``f`` on every worker's own row of the arrays; its result is the same on all of them."""
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    mesh = make_mesh(shape, devices=devices)
    axes = {axis} if isinstance(axis, str) else set(axis)
    mapped = jax.shard_map(
        lambda *xs: f(*(x[0] for x in xs)),
        mesh=mesh,
        in_specs=P(axis),
        out_specs=P(),
        axis_names=axes,
    )
    compiled = jax.jit(mapped).lower(*map(jnp.asarray, stacked)).compile()
    return compiled(*map(jnp.asarray, stacked)), bytes_per_axis(collectives(compiled, mesh))


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_along_a_dim(of, weights, dim):
    stacked = np.moveaxis(LOGITS, 0, dim % 3)
    mean = ensemble(stacked, dim, of, weights)
    np.testing.assert_allclose(mean, dense(LOGITS, of, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", OF)
def test_of_a_list(of):
    np.testing.assert_allclose(
        ensemble(list(LOGITS), 0, of, WEIGHTS), dense(LOGITS, of, WEIGHTS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ({"data": 4}, "data"),
        ({"data": 4, "model": 2}, "data"),
        ({"slice": 2, "data": 2}, ("slice", "data")),
    ],
)
def test_over_a_mesh_axis(of, shape, axis):
    """With weights, and the bytes of one all-reduce of the outputs and one of a number."""
    combined, sent = over_mesh(lambda x, w: ensemble(x, axis, of, w), shape, axis, LOGITS, WEIGHTS)
    np.testing.assert_allclose(combined, dense(LOGITS, of, WEIGHTS), rtol=1e-5, atol=1e-5)
    axes = (axis,) if isinstance(axis, str) else axis
    bound = 2 * (MODELS - 1) * 4 * (SAMPLES * CLASSES + 1) / MODELS
    # Each all-reduce is rounded up to whole bytes.
    assert bound <= sent.pop(axes) <= bound + 2
    assert not any(sent.values())


def test_over_a_mesh_axis_without_weights():
    combined, sent = over_mesh(lambda x: ensemble(x, "data"), {"data": 4}, "data", LOGITS)
    np.testing.assert_allclose(combined, LOGITS.mean(0), rtol=1e-6, atol=1e-6)
    assert sent == {("data",): 2 * (MODELS - 1) * 4 * SAMPLES * CLASSES // MODELS}


@pytest.mark.parametrize("where", ["dim", "mesh"])
def test_half_precision_is_added_up_in_full(where):
    """In bfloat16 256 + 1 is 256."""
    x = jnp.array([[256.0], [4.0], [4.0], [4.0]], jnp.bfloat16)
    if where == "dim":
        mean = ensemble(x, 0)
    else:
        mean, _ = over_mesh(lambda x: ensemble(x, "data"), {"data": 4}, "data", x)
    assert mean.dtype == jnp.bfloat16
    assert float(mean[0]) == 67.0


def losses():
    """Losses convex in what the ensemble averages, on random labels."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, SAMPLES)
    targets = rng.normal(size=(SAMPLES, CLASSES))

    def picked(log_p):
        return -np.mean(np.take_along_axis(np.asarray(log_p), labels[:, None], axis=-1))

    return {
        ("outputs", "squared error"): lambda o: np.mean((np.asarray(o) - targets) ** 2),
        ("outputs", "cross-entropy of logits"): lambda o: float(
            optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(o), labels).mean()
        ),
        ("probabilities", "cross-entropy"): lambda p: picked(np.log(np.asarray(p))),
        ("probabilities", "Brier score"): lambda p: np.mean(
            (np.asarray(p) - np.eye(CLASSES)[labels]) ** 2
        ),
        ("log_probabilities", "cross-entropy"): picked,
    }


@pytest.mark.parametrize("case", losses(), ids=" of ".join)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_jensens_bound(case, weights):
    """L(mean of answers) <= mean of L(answer), for many sets of models, and strictly."""
    of, _ = case
    loss = losses()[case]
    rng = np.random.default_rng(7)
    for scale in (0.1, 1.0, 5.0):
        for _ in range(5):
            logits = scale * rng.normal(size=(MODELS, SAMPLES, CLASSES)).astype(np.float32)
            alone = [loss(ensemble(logits[k : k + 1], 0, of)) for k in range(MODELS)]
            together = loss(ensemble(logits, 0, of, weights))
            assert together < np.average(alone, weights=weights)


def test_equal_models_are_their_own_ensemble():
    for of in OF:
        same = np.repeat(LOGITS[:1], MODELS, axis=0)
        alone = ensemble(LOGITS[:1], 0, of)
        np.testing.assert_allclose(ensemble(same, 0, of), alone, rtol=1e-5, atol=1e-6)


def test_log_probabilities_are_those_of_the_mean_logits():
    log_p = ensemble(LOGITS, 0, "log_probabilities")
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(log_p, log_softmax(LOGITS.mean(0), axis=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_model_shows_unless_it_has_no_weight(bad):
    logits = LOGITS.copy()
    logits[1, 2, 3] = bad
    mean = np.asarray(ensemble(logits, 0))
    assert not np.isfinite(mean[2, 3])
    assert np.isfinite(mean).sum() == mean.size - 1
    without = ensemble(logits, 0, weights=np.array([1.0, 0, 1, 1], np.float32))
    np.testing.assert_allclose(without, LOGITS[[0, 2, 3]].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ensemble([LOGITS[0], LOGITS[1, :, :4]], 0), r"model 1 gives float32\[6, 4\]"),
        (lambda: ensemble([LOGITS[0], LOGITS[1].astype(np.float16)], 0), "model 1 gives float16"),
        (lambda: ensemble([], 0), "a list of 0 models"),
        (lambda: ensemble(list(LOGITS), 1), "axis=0"),
        (lambda: ensemble(list(LOGITS), "data"), "each worker gives one array"),
        (lambda: ensemble(LOGITS, 3), r"axis=3, but the outputs have shape \(4, 6, 5\)"),
        (lambda: ensemble(LOGITS[:0], 0), "at least one model"),
        (lambda: ensemble(LOGITS, True), "axis=True"),
        (lambda: ensemble(LOGITS, ()), r"axis=\(\)"),
        (lambda: ensemble(LOGITS, "data"), "axis 'data' is not bound"),
        (lambda: ensemble(LOGITS, 0, "logits"), "of='logits' is not one of"),
        (lambda: ensemble(LOGITS[:, 0, 0], 0, "probabilities"), "no dim of classes"),
        (lambda: ensemble(LOGITS.astype(np.int32), 0), "combined by vote"),
        (lambda: ensemble(LOGITS, 0, weights=np.ones(3)), r"shape \(3,\); expected \(4,\)"),
        (lambda: ensemble(LOGITS, 0, weights=np.zeros(4)), "not all zero"),
        (lambda: ensemble(LOGITS, 0, weights=-np.ones(4)), "none negative"),
        (lambda: ensemble(LOGITS, 0, weights=np.full(4, np.nan)), "finite"),
        (
            lambda: over_mesh(
                lambda x: ensemble(x, "data", weights=jnp.ones(4)), {"data": 4}, "data", LOGITS
            ),
            "this worker's, a scalar",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_traces_under_jit():
    jitted = jax.jit(functools.partial(ensemble, axis=0, of="probabilities"))
    np.testing.assert_allclose(
        jitted(LOGITS, weights=WEIGHTS), dense(LOGITS, "probabilities", WEIGHTS), rtol=1e-5
    )
