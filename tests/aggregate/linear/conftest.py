"""In f64 unless a test says otherwise: formulas are held to bounds that f32 does not reach."""

import jax
import pytest


@pytest.fixture(autouse=True)
def in_f64():
    with jax.enable_x64(True):
        yield
