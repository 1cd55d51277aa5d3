"""With a delay the exchange stands behind the step's computation, on TPU's schedule.

Compiled for v5e with libtpu and without a TPU: two steps or more lie in one program.
"""

import importlib.util

import jax
import pytest

from benchmarks import overlap
from jdml.communicate.codecs import int8
from jdml.sharding import ASYNCHRONOUS_ON_TPU

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)
WIDTH, NUM_LAYERS = 1024, 2
# Forward and backward; the first layer's input needs no gradient.
FLOPS = (3 * NUM_LAYERS - 1) * 2 * WIDTH**3


def schedules(codec, options):
    """Without and with a delay of one step."""
    mesh = overlap.tpu_mesh()
    return [
        overlap.compile_steps(mesh, {"codec": codec}, delay, options, WIDTH, NUM_LAYERS)
        for delay in (0, 1)
    ]


@pytest.mark.parametrize("name", ["all-reduce", "all-to-all"])
@pytest.mark.tpu_compile
@needs_libtpu
def test_a_delay_puts_the_exchange_behind_the_step(name):
    now, late = schedules(None if name == "all-reduce" else int8(), ASYNCHRONOUS_ON_TPU)
    for schedule in (now, late):
        assert schedule.flops == FLOPS
        found = [i for i in schedule.exchanges if i.collective.kind == name]
        assert len(found) == NUM_LAYERS
        assert all(i.collective.loops == (overlap.NUM_STEPS,) for i in found)
        assert all(i.start != i.done for i in found if i.collective.asynchronous)
    # What is sent at once waits for the gradients, so that at most other layers' are computed
    # meanwhile; what is sent late waits for nothing.
    assert late.hidden > now.hidden
    assert late.hidden > 0.8 * FLOPS
    if name == "all-to-all":
        assert now.hidden == 0


@pytest.mark.tpu_compile
@needs_libtpu
def test_as_they_come_all_reduces_hold_everything_up():
    late = overlap.compile_steps(overlap.tpu_mesh(), {"codec": None}, 1, None, WIDTH, NUM_LAYERS)
    assert {i.collective.kind for i in late.exchanges} == {"all-reduce"}
    assert not any(i.collective.asynchronous for i in late.exchanges)
    assert late.hidden == 0


def test_is_skipped_with_a_reason_where_libtpu_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before = jax.config.jax_platforms
    with pytest.raises(SystemExit) as stopped:
        overlap.main()
    assert stopped.value.code == 0
    assert "libtpu is not installed" in capsys.readouterr().out
    assert jax.config.jax_platforms == before
