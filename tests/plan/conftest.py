"""One small model for the tests of the planner."""

import pytest

from jdml.models import TransformerConfig


@pytest.fixture(scope="session")
def config():
    return TransformerConfig(
        vocab_size=4096, num_layers=3, embed_dim=128, num_heads=8, num_kv_heads=4, head_dim=32,
        mlp_dim=256, dtype="float32", remat="full",
    )  # fmt: skip
