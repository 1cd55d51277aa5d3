"""What the largest exchange is measured against."""

import pytest

from jdml.models.transformer.presets import llama3
from jdml.plan import Layout
from jdml.plan.largest import largest
from jdml.plan.tables import num_pieces


def row(axes, kind, dtype, size):
    return {"axes": axes, "kind": kind, "dtype": dtype, "largest": size}


def test_by_class_and_dtype():
    config, layout = llama3("8b"), Layout(2, 8, 4)
    layer = config.num_layer_params / 4
    stream = 2 * 512 * config.embed_dim
    rows = [
        row(["fsdp"], "all-gather", "bf16", 2 * layer),
        row(["fsdp"], "reduce-scatter", "f32", 3 * layer),
        row(["data"], "all-reduce", "f32,bf16", layer),
        row(["model"], "all-reduce", "bf16", 2 * stream),
        row(["fsdp"], "all-to-all", "bf16", stream),
    ]
    found = largest(rows, config, layout, 32, 512)
    assert found["parameters"].row is rows[0]
    assert found["parameters"].layers == pytest.approx(1)
    assert found["activations"].layers == pytest.approx(1)
    assert "activations" not in largest(rows[:3], config, layout, 32, 512)


@pytest.mark.parametrize(("size", "pieces"), [("8b", 3), ("70b", 2)])
def test_a_head_is_cut_into_pieces_no_larger_than_a_layer(size, pieces):
    config = llama3(size)
    head = config.vocab_size * config.embed_dim
    assert num_pieces(config, Layout(1, 64, 1), 4096) == pieces
    assert head / pieces <= config.num_layer_params < head / (pieces - 1)
    # Where nothing divides it, or all positions are one chunk, the head is in one.
    assert num_pieces(config, Layout(64), 4096) is None
    assert num_pieces(config, Layout(1, 64, 1), 128) is None


def test_a_layer_is_what_two_models_differ_by():
    config = llama3("8b")
    more = llama3("8b", num_layers=33)
    assert config.num_layer_params == more.num_params - config.num_params
