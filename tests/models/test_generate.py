"""Generation with a cache against the forward pass without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.models import generate
from jdml.models.transformer.generate import _generate

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}], ids=str)
def test_greedy_equals_the_forward_pass_without_a_cache(make, tokens, changes):
    model = make(**changes)
    prompt = tokens[:, :5]
    text = prompt
    forward = jax.jit(lambda text: model(text))
    for _ in range(6):
        padded = jnp.pad(text, ((0, 0), (0, 11 - text.shape[1])))  # causal: padding has no say
        best = jnp.argmax(forward(padded)[:, text.shape[1] - 1], axis=-1)
        text = jnp.concatenate([text, best[:, None].astype(text.dtype)], axis=1)
    np.testing.assert_array_equal(generate(model, prompt, 6, temperature=0), text[:, 5:])


def test_decode_in_parts_gives_the_logits_of_the_whole(make, forward, tokens):
    model = make()

    @jax.jit
    def in_parts(tokens):
        _, cache = model.decode(tokens[:, :5], model.init_cache(4, 12))
        _, cache = model.decode(tokens[:, 5:6], cache)
        last, cache = model.decode(tokens[:, 6:], cache)
        return last, model.decode(tokens[:, :1], cache)[0]

    last, overflown = in_parts(tokens)
    np.testing.assert_allclose(last, forward(model, tokens)[:, -1], rtol=1e-4, atol=1e-5)
    assert bool(jnp.isnan(overflown).all())  # not a plausible answer


def test_compiles_once_for_all_temperatures_and_prompts(make, tokens):
    model, key = make(), jax.random.key(0)
    before = _generate._cache_size()
    generate(model, tokens[:, :4], 3, key, temperature=0.7)
    generate(model, tokens[:, 4:8], 3, key, temperature=1.3)
    model.norm.scale[...] = 2 * model.norm.scale[...]
    generate(model, tokens[:, 4:8], 3, key)
    assert _generate._cache_size() == before + 1


def test_sampling_keeps_to_the_likeliest_and_follows_its_key(make, forward, tokens):
    model, prompt = make(), tokens[:1, :6]
    many = jnp.repeat(prompt, 64, axis=0)
    drawn = generate(model, many, 1, jax.random.key(3), temperature=5.0, top_k=3)
    allowed = set(np.argsort(np.asarray(forward(model, prompt)[0, -1]))[-3:].tolist())
    assert set(np.asarray(drawn).ravel().tolist()) == allowed
    one = generate(model, many, 4, jax.random.key(3), top_k=1)
    np.testing.assert_array_equal(one, generate(model, many, 4, temperature=0))
    np.testing.assert_array_equal(
        drawn, generate(model, many, 1, jax.random.key(3), temperature=5.0, top_k=3)
    )


def test_sampled_frequencies_are_the_models_probabilities(make, forward, tokens):
    model, prompt = make(), tokens[:1, :6]
    drawn = generate(model, jnp.repeat(prompt, 4000, axis=0), 1, jax.random.key(4), temperature=2.0)
    frequency = np.bincount(np.asarray(drawn).ravel(), minlength=24) / 4000
    wanted = jax.nn.softmax(forward(model, prompt)[0, -1] / 2.0)
    # Four standard deviations of the likeliest frequency.
    assert np.abs(frequency - wanted).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 60}, "max_seq_len"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 25}, "top_k"),
        ({"key": None}, "key"),
        ({"prompt": jnp.zeros((1, 0), jnp.int32)}, "prompt"),
    ],
    ids=str,
)
def test_refuses(make, tokens, arguments, message):
    given = {"prompt": tokens, "num_tokens": 2, "key": jax.random.key(0)} | arguments
    with pytest.raises(ValueError, match=message):
        generate(make(), **given)
