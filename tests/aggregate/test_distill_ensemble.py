"""EC-DNN rounds: against workers simulated one by one, in bytes, in memory, resumed, refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import average_params, distill_ensemble, ensemble, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int4, int8
from jdml.sharding import bytes_per_axis, collectives, make_mesh
from jdml.train import Checkpointer, make_step
from tests.marks import slow

INPUT, HIDDEN, CLASSES, BATCH = 8, 16, 3, 16
LOCAL, DISTIL, PARTS, RATE = 2, 3, 2, 0.1

MESHES = {
    "data": ({"data": 4}, "data"),
    "data×model": ({"data": 4, "model": 2}, "data"),
    "data×fsdp×model": ({"data": 2, "fsdp": 2, "model": 2}, "data"),
    "two worker axes": ({"slice": 2, "data": 2, "model": 2}, ("data", "slice")),
    "one worker": ({"data": 1, "model": 2}, "data"),
}


def apply_fn(params, inputs, key):
    del key
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def cross_entropy(outputs, targets):
    return jnp.mean(optax.softmax_cross_entropy(outputs, targets))


def parameters():
    a, b = jax.random.split(jax.random.key(0))
    return {
        "in": jax.random.normal(a, (INPUT, HIDDEN)),
        "out": jax.random.normal(b, (HIDDEN, CLASSES)),
    }


def batches(num=40, size=BATCH):
    rng = np.random.default_rng(0)
    for _ in range(num):
        labels = rng.integers(0, CLASSES, size)
        yield {
            "inputs": rng.normal(size=(size, INPUT)).astype(np.float32),
            "targets": np.eye(CLASSES, dtype=np.float32)[labels],
        }


def build(mesh_name="data", tx=None, **options):
    shape, workers = MESHES[mesh_name]
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    options = {
        "local_steps": LOCAL,
        "distill_steps": DISTIL,
        "num_batches": PARTS,
        "of": "probabilities",
    } | options
    distil = distill_ensemble(apply_fn, cross_entropy, mesh, workers, **options)
    fsdp, model = ("fsdp" if "fsdp" in shape else None), ("model" if "model" in shape else None)
    init, step = make_step(
        distil.loss_fn,
        optax.sgd(RATE) if tx is None else tx,
        mesh,
        workers,
        specs={"in": P(fsdp, model), "out": P(model, None)},
        batch_axes=("fsdp",) if fsdp else (),
    )
    return mesh, distil, init, step


def simulated(num_workers, num_rounds, share="own", weight=1.0):
    """The algorithm as the paper writes it, one worker after the other."""
    models = [parameters()] * num_workers
    size = BATCH // num_workers
    source = batches()

    def loss(w, x, y, asked, said):
        total = cross_entropy(apply_fn(w, x, None), y)
        return total + weight * cross_entropy(apply_fn(w, asked, None), said)

    alone = jax.jit(jax.grad(lambda w, x, y: cross_entropy(apply_fn(w, x, None), y)))
    distilling = jax.jit(jax.grad(loss))

    def descend(w, gradient):
        return jax.tree.map(lambda a, g: a - RATE * g, w, gradient)

    for _ in range(num_rounds):
        for batch in itertools.islice(source, LOCAL):
            x = batch["inputs"].reshape(num_workers, size, -1)
            y = batch["targets"].reshape(num_workers, size, -1)
            models = [descend(w, alone(w, x[k], y[k])) for k, w in enumerate(models)]
        part = list(itertools.islice(source, PARTS))
        x, y = (
            np.stack([b[name].reshape(num_workers, size, -1) for b in part], axis=1)
            for name in ("inputs", "targets")
        )
        said = np.mean([jax.nn.softmax(apply_fn(w, x, None)) for w in models], axis=0)
        new = []
        for k, w in enumerate(models):
            for i in range(DISTIL):
                own = (k, i % PARTS)
                if share == "own":
                    asked, heard = x[own], said[own]
                else:  # everyone's, one sample of each worker after the other
                    at = k * PARTS * size + i * size + np.arange(size)
                    at %= num_workers * PARTS * size
                    row, worker = np.divmod(at, num_workers)
                    asked, heard = (
                        a.reshape(num_workers, PARTS * size, -1)[worker, row] for a in (x, said)
                    )
                w = descend(w, distilling(w, x[own], y[own], asked, heard))
            new.append(w)
        models = new
    return models


def close(state, models, atol=2e-6):
    for k, model in enumerate(models):
        for name, x in model.items():
            np.testing.assert_allclose(state.params[name][k], x, atol=atol, err_msg=f"{k} {name}")


# Every mesh, both routes, both kinds of sharing, inputs common or not: each at least twice.


CASES = [
    slow("data", "own", "outputs", False),
    ("data", "inputs", "parameters", False),
    slow("data", "own", "parameters", True),
    ("data×model", "own", "parameters", False),
    ("data×model", "own", "outputs", True),
    slow("data×fsdp×model", "inputs", "outputs", False),
    slow("data×fsdp×model", "own", "parameters", False),
    ("two worker axes", "own", "outputs", False),
    slow("two worker axes", "inputs", "parameters", True),
    slow("one worker", "own", "outputs", False),
    slow("one worker", "inputs", "parameters", False),
]


@pytest.mark.parametrize(("mesh_name", "share", "route", "common"), CASES)
def test_equals_workers_one_by_one_and_sends_what_it_counts(mesh_name, share, route, common):
    mesh, distil, init, step = build(mesh_name, share=share, route=route, common_inputs=common)
    state, source = init(parameters(), 0), batches()
    for _ in range(2):
        state, metrics = distil.round(step, state, source)
    num_workers = distil.asks.num_workers
    close(state, simulated(num_workers, 2, share))
    assert set(metrics) == {"loss", "label_loss", "distill_loss"}

    batch = next(batches(1))
    exchange = distil.exchange(state.params, batch)
    assert exchange.route == route
    compiled = distil.asks.lower(state.params, [batch["inputs"]] * PARTS).compile()
    sent = bytes_per_axis(collectives(compiled, mesh))
    between = set(MESHES[mesh_name][1]) if isinstance(MESHES[mesh_name][1], tuple) else {"data"}
    counted = sum(n for axes, n in sent.items() if between & set(axes or ()))
    assert counted == exchange.sent
    if num_workers > 1:
        assert exchange.sent > 0


def test_bytes_by_hand():
    """The formulas of the docstring, with and without a codec."""
    _, distil, init, _ = build()
    params, batch = init.abstract(parameters()).params, next(batches(1))
    samples = PARTS * BATCH // 4
    inputs, outputs = samples * INPUT * 4, samples * CLASSES * 4
    model = 4 * HIDDEN * (INPUT + CLASSES)
    assert distil.exchange(params, batch) == ("outputs", 3 * (inputs + outputs), 3 * model)
    _, distil, _, _ = build(codec=int8(8))
    encoded = samples * CLASSES * (1 + 4 / 8)
    assert distil.exchange(params, batch).outputs == 3 * (inputs + encoded)
    _, distil, _, _ = build(share="inputs", common_inputs=True)
    assert distil.exchange(params, batch)[1:] == (6 * outputs, 3 * (model + outputs))
    small = {**batch, "inputs": batch["inputs"].astype(np.float16)}
    assert build()[1].exchange(params, small).outputs == 3 * (inputs // 2 + outputs)


def test_the_route_is_that_of_fewer_bytes():
    routes = {}
    for num_batches in (1, 2, 4, 8, 16):
        _, distil, init, _ = build(num_batches=num_batches)
        exchange = distil.exchange(init.abstract(parameters()).params, next(batches(1)))
        assert exchange.sent == min(exchange.outputs, exchange.parameters)
        routes[num_batches] = exchange.route
    assert routes[1] == "outputs"
    assert routes[16] == "parameters"


def test_a_codec_goes_over_the_wire_and_changes_little():
    mesh, distil, init, step = build(codec=int8(8), share="inputs")
    state, source = init(parameters(), 0), batches()
    for _ in range(2):
        state, _ = distil.round(step, state, source)
    # An answer is off by 1/254 at most, in each of two phases; six steps at rate 0.1 follow it.
    close(state, simulated(4, 2, "inputs"), atol=1e-2)
    batch = next(batches(1))
    compiled = distil.asks.lower(state.params, [batch["inputs"]] * PARTS).compile()
    found = collectives(compiled, mesh)
    assert sorted((c.kind, c.dtype) for c in found) == [
        ("all-gather", "f32"),  # the inputs
        ("all-gather", "u8"),
        ("all-to-all", "u8"),
    ]
    counted = sum(c.sent_bytes for c in found)
    assert counted == distil.exchange(state.params, batch).sent


@pytest.mark.slow
def test_a_codec_that_draws_gets_keys_of_the_rounds():
    _, distil, init, step = build(
        codec=int4(8, rounding="stochastic"), num_batches=1, distill_steps=1
    )
    state = init(parameters(), 0)
    batch = next(batches(1))
    with pytest.raises(ValueError, match="pass key="):
        distil.relabel(state.params, [batch])
    told = [
        np.asarray(distil.relabel(state.params, [batch], jax.random.key(i)).ensemble)
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(told[0], told[1])
    assert (told[0] != told[2]).any()
    distil.round(step, state, batches())


@pytest.mark.parametrize("route", ["outputs", slow("parameters")])
@pytest.mark.parametrize("of", ["outputs", "probabilities", "log_probabilities"])
def test_answers_are_the_ensembles_and_jensens_bound_holds(route, of):
    """What the workers are told of their samples is no worse than what they said, on average."""
    _, distil, init, step = build(of="probabilities", route=route)
    state, _ = distil.round(step, init(parameters(), 0), batches())
    _, distil, _, _ = build(of=of, route=route)
    part = list(batches(PARTS))
    told = np.asarray(distil.relabel(state.params, part).ensemble)
    everyone = np.stack([b["inputs"].reshape(4, -1, INPUT) for b in part], axis=1)
    labels = np.stack([b["targets"].reshape(4, -1, CLASSES) for b in part], axis=1)
    said = distil.outputs(state.params, everyone.reshape(-1, INPUT))
    said = said.reshape(4, *labels.shape)
    np.testing.assert_allclose(told, ensemble(said, 0, of), rtol=1e-5, atol=1e-6)

    def loss(answers):
        if of == "outputs":
            return float(cross_entropy(answers, labels))
        log_p = np.log(answers) if of == "probabilities" else answers
        return -np.mean(np.sum(labels * np.asarray(log_p), axis=-1))

    alone = [loss(ensemble(said[k : k + 1], 0, of)) for k in range(4)]
    assert min(alone) < max(alone)
    assert loss(told) < np.mean(alone)


def test_without_weight_it_is_local_training():
    """The limit: what the ensemble says is not heard, and each worker trains alone."""
    _, distil, init, step = build(weight=0.0)
    state, _ = distil.round(step, init(parameters(), 0), batches())
    close(state, simulated(4, 1, weight=0.0))
    first = list(batches(LOCAL + PARTS))
    order = [*range(LOCAL), *(LOCAL + i % PARTS for i in range(DISTIL))]
    alone = init(parameters(), 0)
    for i in order:
        alone, _ = step(alone, first[i])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, alone.params
    )


def test_the_models_do_not_grow():
    """Shapes and bytes of the state stay; relabelling holds two models of eight at a time."""
    _, distil, init, step = build(tx=optax.adam(1e-2))
    state, source = init(parameters(), 0), batches()

    def layout(state):
        return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(state)]

    before = layout(state)
    assert jax.tree.map(lambda x: x.shape[1:], state.params) == jax.tree.map(
        jnp.shape, parameters()
    )
    for _ in range(3):
        state, _ = distil.round(step, state, source)
        assert layout(state) == before

    width, num_workers = 4096, 8
    mesh = make_mesh({"data": num_workers})
    large = distill_ensemble(
        lambda w, x, key: jnp.tanh(x @ w["in"]) @ w["out"],
        cross_entropy,
        mesh,
        local_steps=1,
        distill_steps=1,
        route="parameters",
    )
    over = NamedSharding(mesh, P("data"))
    params = {
        "in": jax.ShapeDtypeStruct((num_workers, INPUT, width), jnp.float32, sharding=over),
        "out": jax.ShapeDtypeStruct((num_workers, width, CLASSES), jnp.float32, sharding=over),
    }
    inputs = jax.ShapeDtypeStruct((num_workers, INPUT), jnp.float32, sharding=over)
    memory = large.asks.lower(params, [inputs]).compile().memory_analysis()
    model = 4 * width * (INPUT + CLASSES)
    assert memory.argument_size_in_bytes < 1.1 * model
    # The visitor, and the next one arriving. All eight would take seven.
    assert memory.temp_size_in_bytes < 2.5 * model


@pytest.mark.slow
def test_resumes_between_rounds_bit_for_bit(tmp_path):
    def rounds(distil, step, state, source, num):
        for _ in range(num):
            state, _ = distil.round(step, state, source)
        return state

    options = {"tx": optax.sgd(RATE, momentum=0.9), "codec": int4(8, rounding="stochastic")}
    _, distil, init, step = build("data×model", **options)
    whole = rounds(distil, step, init(parameters(), 0), batches(), 3)
    half = rounds(distil, step, init(parameters(), 0), batches(), 1)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, half, wait=True)
    _, distil, init, step = build("data×model", **options)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        state, _, _ = checkpointer.restore(init.abstract(parameters()))
    rest = itertools.islice(batches(), distil.batches_per_round, None)
    resumed = rounds(distil, step, state, rest, 2)
    assert int(resumed.step) == 3 * distil.steps_per_round
    for x, y in zip(
        jax.tree.leaves((whole.params, whole.opt_state)),
        jax.tree.leaves((resumed.params, resumed.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_models_are_asked_without_a_key_and_trained_with_different_ones():
    """Dropout is off where the ensemble gives its opinion, and on in the steps."""
    seen = []

    def with_dropout(params, inputs, key):
        seen.append(key is None)
        if key is not None:
            inputs = inputs * jax.random.bernoulli(key, 0.5, inputs.shape)
        return apply_fn(params, inputs, None)

    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    distil = distill_ensemble(
        with_dropout, cross_entropy, mesh, local_steps=1, distill_steps=1, share="inputs"
    )
    w, batch = parameters(), next(batches(1))
    distil.loss_fn(w, batch, jax.random.key(0))
    assert not any(seen)
    seen.clear()
    batch |= {"asked": batch["inputs"], "ensemble": batch["targets"]}
    _, metrics = distil.loss_fn(w, batch, jax.random.key(0))
    assert seen == [False, False]
    assert float(metrics["label_loss"]) != float(metrics["distill_loss"])  # two masks
    seen.clear()
    init, _ = make_step(distil.loss_fn, optax.sgd(RATE), mesh)
    distil.relabel(init(w, 0).params, [next(batches(1))])
    assert all(seen)
    assert seen


@pytest.mark.slow
def test_integer_labels_and_a_loss_of_its_own_for_answers():
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    distil = distill_ensemble(
        apply_fn,
        lambda o, y: optax.softmax_cross_entropy_with_integer_labels(o, y).mean(),
        mesh,
        local_steps=1,
        distill_steps=2,
        of="probabilities",
        distill_loss_fn=cross_entropy,
        weight=0.5,
    )
    init, step = make_step(distil.loss_fn, optax.sgd(RATE), mesh)
    labelled = ({**b, "targets": b["targets"].argmax(-1)} for b in batches())
    _, metrics = distil.round(step, init(parameters(), 0), labelled)
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 0}, "local_steps=0"),
        ({"distill_steps": 1.0}, "distill_steps=1.0"),
        ({"num_batches": True}, "num_batches=True"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"of": "logits"}, "of='logits'"),
        ({"share": "all"}, "share='all'"),
        ({"route": "both"}, "route='both'"),
        ({"codec": error_feedback(int8())}, "other samples"),
        ({"codec": int8}, "expected None or a codec"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_other_axes_are_refused():
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    for workers in ("model", (), ("data", "model")):
        with pytest.raises(ValueError, match="the mesh has axes"):
            distill_ensemble(apply_fn, cross_entropy, mesh, workers, local_steps=1, distill_steps=1)


def test_models_made_equal_every_step_are_refused():
    mesh, distil, _, _ = build()
    for chain in (
        optax.chain(mean_gradients("data"), optax.sgd(RATE)),
        optax.chain(optax.sgd(RATE), average_params("data", 1)),
    ):
        init, _ = make_step(distil.loss_fn, chain, mesh)
        with pytest.raises(ValueError, match=r"'in' .* is not per worker"):
            distil.relabel(init(parameters(), 0).params, list(batches(1)))


def test_other_batches_and_outputs_are_refused():
    mesh, distil, init, _ = build()
    params = init(parameters(), 0).params
    good, shorter = next(batches(1)), next(batches(1, 8))
    with pytest.raises(ValueError, match="batch 1"):
        distil.relabel(params, [good, shorter])
    with pytest.raises(ValueError, match="no batches"):
        distil.relabel(params, [])
    with pytest.raises(ValueError, match=r"shape \(6, 8\).*multiple of 4"):
        distil.relabel(params, list(batches(1, 6)))
    with pytest.raises(ValueError, match=r"'inputs'.*got \['x'\]"):
        distil.relabel(params, [{"x": good["inputs"]}])
    divided = jax.device_put(good, NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="leave out common_inputs"):
        build(common_inputs=True)[1].relabel(params, [divided])

    def asked(f):
        return distill_ensemble(
            f, cross_entropy, mesh, local_steps=1, distill_steps=1, of="probabilities"
        ).relabel(params, [good])

    with pytest.raises(ValueError, match=r"expected one array \[4, ...\]"):
        asked(lambda p, x, key: apply_fn(p, x, key).mean())
    with pytest.raises(ValueError, match=r"expected one array \[4, ...\]"):
        asked(lambda p, x, key: (apply_fn(p, x, key), x))
    with pytest.raises(ValueError, match="dtype int32; expected floats"):
        asked(lambda p, x, key: jnp.argmax(apply_fn(p, x, key), axis=-1))
    with pytest.raises(ValueError, match="no dim of classes"):
        asked(lambda p, x, key: apply_fn(p, x, key).mean(axis=-1))
