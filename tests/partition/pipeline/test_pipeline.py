"""The compiled pipeline against the same model on one device: loss, metrics, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.partition.pipeline import gpipe, interleaved, one_f_one_b, pipeline, zero_bubble
from tests.partition.pipeline.model import (
    block,
    close,
    first,
    last,
    make_batch,
    make_params,
    mesh_of,
)

CASES = {
    # stages, schedule, micro-batches, layers (or layers of each part), remat
    "gpipe-2": (2, gpipe(), 4, 4, False),
    "gpipe-8": (8, gpipe(), 8, 8, False),
    "1f1b-1": (1, one_f_one_b(), 4, 4, False),
    "1f1b-2": (2, one_f_one_b(), 2, 4, False),
    "1f1b-4": (4, one_f_one_b(), 8, 8, False),
    "1f1b-4-unequal": (4, one_f_one_b(), 6, (3, 2, 2, 1), False),
    "1f1b-4-remat": (4, one_f_one_b(), 4, 8, True),
    "interleaved-2": (2, interleaved(2), 4, 8, False),
    "interleaved-4": (4, interleaved(2), 8, 8, False),
    "interleaved-2-unequal": (2, interleaved(3), 4, (1, 2, 1, 1, 2, 1), False),
    "zero-bubble-2": (2, zero_bubble(), 6, 4, False),
    "zero-bubble-4": (4, zero_bubble(), 8, 8, False),
    "zero-bubble-4-unequal": (4, zero_bubble(), 4, (3, 2, 2, 1), False),
}


QUICK = {"1f1b-4-unequal", "interleaved-2"}


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_gradients_are_one_devices(case):
    num_stages, schedule, micro_batches, layers, remat = CASES[case]
    num_layers = layers if isinstance(layers, int) else sum(layers)
    pipe = pipeline(
        first,
        block,
        last,
        mesh_of(stage=num_stages),
        num_layers=num_layers,
        micro_batches=micro_batches,
        schedule=schedule,
        layers=None if isinstance(layers, int) else layers,
        remat=remat,
    )
    params, batch = make_params(num_layers), make_batch()
    key = jax.random.key(3)
    arranged = pipe.arrange(params)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(pipe, has_aux=True))(
        arranged, batch, key
    )
    reference = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))
    (want_loss, want_metrics), want = reference(params, batch, key)
    close((loss, metrics), (want_loss, want_metrics))
    close(pipe.restore(gradients), want)


def test_evaluation_runs_forward_alone():
    pipe = pipeline(first, block, last, mesh_of(stage=4), num_layers=8, micro_batches=8)
    params, batch = make_params(8), make_batch()
    got = jax.jit(pipe)(pipe.arrange(params), batch)
    close(got, jax.jit(pipe.reference)(params, batch))


@pytest.mark.slow
def test_bfloat16_activations():
    """Sums in another order, each rounded to 8 bits; parameters and their gradients are f32."""

    def narrow_block(params, x, batch, key):
        return block(jax.tree.map(lambda p: p.astype(x.dtype), params), x, batch, key)

    def narrow_first(others, batch, key):
        return first(others, batch, key).astype(jnp.bfloat16)

    pipe = pipeline(
        narrow_first,
        narrow_block,
        lambda others, x, batch, key: last(others, x.astype(jnp.float32), batch, key),
        mesh_of(stage=4),
        num_layers=4,
        micro_batches=4,
        schedule=zero_bubble(),
    )
    params, batch = make_params(4), make_batch()
    gradients, _ = jax.jit(jax.grad(pipe, has_aux=True))(pipe.arrange(params), batch)
    want, _ = jax.jit(jax.grad(pipe.reference, has_aux=True))(params, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max()),
        pipe.restore(gradients),
        want,
    )


def test_arranged_and_restored():
    for layers in (None, (1, 3, 2, 2)):
        pipe = pipeline(
            first,
            block,
            last,
            mesh_of(stage=2),
            num_layers=8,
            micro_batches=2,
            schedule=interleaved(2),
            layers=layers,
        )
        params = make_params(8)
        arranged = pipe.arrange(params)
        assert arranged["layers"]["up"].shape[:3] == (2, 2, 2 if layers is None else 3)
        # Chunk 1 of stage 0 is part 2 of the model.
        np.testing.assert_array_equal(arranged["layers"]["up"][1, 0, 0], params["layers"]["up"][4])
        jax.tree.map(np.testing.assert_array_equal, pipe.restore(arranged), params)


def make(**changes):
    options = {"num_layers": 8, "micro_batches": 4} | changes
    return pipeline(first, block, last, options.pop("mesh", mesh_of(stage=4)), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": "pipe"}, r"mesh has axes \('stage',\), not 'pipe'"),
        ({"num_layers": 10}, r"10 layers for 4 parts.*Use 8 or 12 layers.*layers=\(3, 3, 2, 2\)"),
        ({"num_layers": 3}, "3 layers for 4 parts.*Use 4 layers"),
        ({"layers": (4, 4)}, "expected 4 ints of at least 1"),
        ({"layers": (4, 2, 1, 2)}, "are 9 in all; expected num_layers=8"),
        ({"micro_batches": 3}, "3 micro-batches for 4 stages"),
        ({"micro_batches": 6, "schedule": interleaved(2)}, "groups of 4. Use 4 or 8"),
        ({"remat": True, "schedule": zero_bubble()}, "jax.checkpoint instead"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_parameters_and_batches_that_do_not_fit_are_refused():
    pipe = make()
    params, batch = make_params(8), make_batch()
    with pytest.raises(ValueError, match=r"expected \[1 chunks, 4 stages, 2 layers.*arrange"):
        pipe(params, batch)
    with pytest.raises(ValueError, match=r"an entry 'layers'.*stack="):
        pipe({"blocks": params}, batch)
    with pytest.raises(ValueError, match=r"'down' of the stack.*8 layers"):
        pipe.arrange(make_params(7))
    with pytest.raises(ValueError, match=r"batch leaf 'x'.*4 micro-batches.*Use 8 samples"):
        pipe(pipe.arrange(params), make_batch(7))
    with pytest.raises(ValueError, match="divides its layers over 'stage'"):
        pipe.specs({"layers": {"up": P("stage")}})
    with pytest.raises(ValueError, match="a block returned"):
        pipeline_of_wide_blocks()(pipe.arrange(params), batch)


def pipeline_of_wide_blocks():
    def wide(params, x, batch, key):
        return jnp.concatenate([x, x], axis=-1)

    return pipeline(first, wide, last, mesh_of(stage=4), num_layers=8, micro_batches=4)
