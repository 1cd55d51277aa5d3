"""bfloat16 products over float32 parameters: what the compiled step multiplies, keeps and sends."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jdml.aggregate import mean_gradients
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import collectives, make_mesh, presets
from jdml.train import make_step

CONFIG = TransformerConfig(
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24,
    dtype="bfloat16",
)  # fmt: skip

SEQ = 12
PRODUCT = re.compile(r"dot_general .*: \(tensor<(\w+)>, tensor<(\w+)>\) -> tensor<(\w+)>")


def test_state_products_and_gradients_of_a_bfloat16_step():
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(params)

    def loss_fn(params, batch, key):
        del key
        return next_token_loss(nnx.merge(graphdef, params), batch, batch), {}

    tx = optax.chain(mean_gradients("data"), optax.adam(1e-3))
    init, step = make_step(loss_fn, tx, mesh, rules=presets.data_parallel())
    state = init.abstract(params)
    # Master weights, and two moments of each.
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}

    lowered = step.lower(state, jax.ShapeDtypeStruct((4, SEQ), jnp.int32))
    kinds = Counter()
    for operands in PRODUCT.findall(lowered.as_text()):
        dtypes = tuple(operand.split("x")[-1] for operand in operands[:2])
        kinds[dtypes] += 1
        if dtypes != ("bf16", "bf16"):  # only gradients of scores and of logits, which are f32
            dims = [operand.split("x")[:-1] for operand in operands]
            assert any("40" in d or d.count(str(SEQ)) == 2 for d in dims), operands
    # Seven kernels of a layer, and two products of scores: forward, and twice that backward.
    assert kinds["bf16", "bf16"] >= 3 * 7 + 2

    # Every gradient is reduced in float32: four bytes a parameter, and the loss.
    found = collectives(lowered.compile(), mesh)
    assert {c.dtype for c in found} == {"f32"}
    num_params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    assert CONFIG.num_params == num_params
    reduced = sum(sum(c.operand_bytes) for c in found if c.kind == "all-reduce")
    assert 4 * num_params <= reduced <= 4 * num_params + 64
