"""The decoder in a pipeline, beside the decoder as it is."""

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.models import (
    Transformer,
    TransformerConfig,
    next_token_loss,
    pipeline_parts,
    training_loss,
)
from jdml.partition.pipeline import one_f_one_b, pipeline, zero_bubble
from jdml.sharding import no_mesh
from tests.partition.pipeline.model import close, mesh_of


def in_two_stages(model, shape, **options):
    """The decoder as a pipeline, and a batch of tokens of the shape, the last one for targets."""
    c = model.config
    tokens = jax.random.randint(jax.random.key(1), shape, 0, c.vocab_size)
    parts = pipeline_parts(model)
    pipe = pipeline(*parts, mesh_of(stage=2), num_layers=c.num_layers, **options)
    return pipe, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        (one_f_one_b(), {"remat": "dots"}),
        (zero_bubble(), {"remat": "none", "tie_embeddings": True}),  # its ends divided
    ],
    ids=["1f1b", "zero-bubble-tied"],
)
def test_gradients_are_the_decoders(schedule, changes):
    config = TransformerConfig(
        vocab_size=32,
        num_layers=4,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        **changes,
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    pipe, batch = in_two_stages(model, (8, 13), micro_batches=4, schedule=schedule)
    if config.tie_embeddings:
        pipe = pipe.divide_ends(params, jax.tree.map(lambda _: P(), params))
        assert pipe.ends == {"embed/embedding": P("stage", None), "norm/scale": P("stage")}

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), batch["inputs"], batch["targets"])

    with no_mesh():
        want, reference = jax.jit(jax.value_and_grad(loss))(params)
        (got, _), gradients = jax.jit(jax.value_and_grad(pipe, has_aux=True))(
            pipe.arrange(params), batch
        )
    close(got, want)
    close(pipe.restore(gradients), reference)


def test_balance_losses_travel_with_the_activations():
    """Loss, metrics and gradients of ``training_loss``, the mean of that of each micro-batch."""
    config = TransformerConfig(
        vocab_size=16, num_layers=2, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
        mlp_dim=8, num_experts=4, balance_weight=0.1, importance_weight=0.2, z_weight=0.3,
    )  # fmt: skip
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(state))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = jax.tree.unflatten(
        treedef, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )
    pipe, batch = in_two_stages(nnx.merge(graphdef, state), (4, 5), micro_batches=2)

    def loss(params):
        def of_a_micro_batch(inputs, targets):
            return training_loss(nnx.merge(graphdef, params), inputs, targets)

        parts = jax.vmap(of_a_micro_batch, in_axes=1)
        both = parts(*(batch[name].reshape(2, 2, -1) for name in ("inputs", "targets")))
        return jax.tree.map(lambda x: x.mean(0), both)

    with no_mesh():
        want, reference = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        got, gradients = jax.jit(jax.value_and_grad(pipe, has_aux=True))(
            pipe.arrange(params), batch
        )
    assert got[1].keys() == want[1].keys() >= {"experts.load_balance", "experts.router_z"}
    close(got, want)
    close(pipe.restore(gradients), reference)
