"""Flax's seq2seq example (Linen): an LSTM of 512 reads a sum, another writes the result."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jdml.sharding import infer_fsdp
from tests.sharding.published.example import Example

VOCAB = 2 + len("0123456789+= ")  # padding and end come first
PADDING, END = 0, 1
INPUT_LENGTH, OUTPUT_LENGTH = 8, 6  # of sums of three digits each


class DecoderLSTMCell(nn.RNNCellBase):
    features: int
    teacher_force: bool
    vocab_size: int

    @nn.compact
    def __call__(self, carry, x):
        lstm_state, last_prediction = carry
        if not self.teacher_force:
            x = last_prediction
        lstm_state, y = nn.LSTMCell(self.features)(lstm_state, x)
        logits = nn.Dense(self.vocab_size)(y)
        token = jax.random.categorical(self.make_rng("lstm"), logits)
        prediction = jax.nn.one_hot(token, self.vocab_size, dtype=jnp.float32)
        return (lstm_state, prediction), (logits, prediction)

    @property
    def num_feature_axes(self):
        return 1


class Seq2seq(nn.Module):
    teacher_force: bool
    hidden_size: int
    vocab_size: int

    @nn.compact
    def __call__(self, encoder_inputs, decoder_inputs):
        encoder = nn.RNN(nn.LSTMCell(self.hidden_size), return_carry=True, name="encoder")
        decoder = nn.RNN(
            DecoderLSTMCell(self.hidden_size, self.teacher_force, self.vocab_size),
            split_rngs={"params": False, "lstm": True},
            name="decoder",
        )
        lengths = jnp.argmax(jnp.argmax(encoder_inputs, axis=-1) == END, axis=-1)
        state, _ = encoder(encoder_inputs, seq_lengths=lengths)
        return decoder(decoder_inputs[:, :-1], initial_carry=(state, decoder_inputs[:, 0]))


MODEL = Seq2seq(teacher_force=True, hidden_size=512, vocab_size=VOCAB)


def make(key):
    query, answer = (jnp.ones((1, length, VOCAB)) for length in (INPUT_LENGTH, OUTPUT_LENGTH))
    return MODEL.init({"params": key, "lstm": key}, query, answer)["params"]


def loss(params, batch, key):
    logits, _ = MODEL.apply({"params": params}, batch["query"], batch["answer"], rngs={"lstm": key})
    labels = batch["answer"][:, 1:]
    written = jnp.argmax(labels, axis=-1) != PADDING
    # As in the example, the mean is over all positions, padded ones counting as zero.
    return jnp.mean(written * optax.softmax_cross_entropy(logits, labels))


def samples(rng, number):
    letters = {letter: 2 + i for i, letter in enumerate(sorted("0123456789+= "))}

    def one_hot(text, length):
        ids = [letters[letter] for letter in text] + [END]
        return np.eye(VOCAB, dtype=np.float32)[ids + [PADDING] * (length - len(ids))]

    pairs = [(rng.integers(0, 100), rng.integers(0, 1000)) for _ in range(number)]
    return {
        "query": np.stack([one_hot(f"{a}+{b}", INPUT_LENGTH) for a, b in pairs]),
        "answer": np.stack([one_hot(f"={a + b}", OUTPUT_LENGTH) for a, b in pairs]),
    }


EXAMPLE = Example(
    make=make,
    loss=loss,
    tx=optax.adam(0.003),
    samples=samples,
    rules=infer_fsdp(min_size=2**12),
    num_params=2 * (4 * (VOCAB + 512 + 1) * 512) + (512 + 1) * VOCAB,
    layout={
        "LSTMCell_0/hf/kernel": P("fsdp", None),
        "LSTMCell_0/hf/bias": P(),
        "LSTMCell_0/if/kernel": P(None, "fsdp"),
        "DecoderLSTMCell_0/LSTMCell_0/ho/kernel": P("fsdp", None),
        "DecoderLSTMCell_0/Dense_0/kernel": P("fsdp", None),
    },
    second_axis="fsdp",
    only_axis="fsdp",
)
