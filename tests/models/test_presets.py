"""Published shapes have the published numbers of parameters, counted from the model itself."""

import math

import jax
import pytest
from flax import nnx

from jdml.models import Transformer
from jdml.models.transformer.presets import gpt2, llama3, mixtral

# Of the released weights; GPT-2's "small" is often quoted as 124 M, "xl" as 1.5 B.
PUBLISHED = {
    "gpt2 small": (gpt2(), 124_439_808),
    "gpt2 medium": (gpt2("medium"), 354_823_168),
    "gpt2 large": (gpt2("large"), 774_030_080),
    "gpt2 xl": (gpt2("xl"), 1_557_611_200),
    "llama3 8b": (llama3(), 8_030_261_248),
    "llama3 70b": (llama3("70b"), 70_553_706_496),
    "mixtral 8x7b": (mixtral(), 46_702_792_704),
    "mixtral 8x22b": (mixtral("8x22b"), 140_620_634_112),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name):
    """From shapes alone: 70 billion parameters would be 282 GB."""
    config, published = PUBLISHED[name]
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model))) == published
    assert config.num_params == published


def test_fields_may_differ():
    assert gpt2("xl", vocab_size=50_304).vocab_size == 50_304
    with pytest.raises(ValueError, match="num_kv_heads"):
        llama3(num_heads=12)
    with pytest.raises(TypeError, match="heads"):
        gpt2(heads=3)


@pytest.mark.parametrize("preset", [gpt2, llama3, mixtral])
def test_other_sizes_are_refused(preset):
    with pytest.raises(ValueError, match=r"no size '13b'; expected one of"):
        preset("13b")
