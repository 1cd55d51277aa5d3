"""Every name of ``--codec`` with its options."""

from typing import get_args

import pytest

from experiments.train_lm.config import CodecName, Config
from experiments.train_lm.content import BLOCKED, SPARSE, UNBIASED, content, run_name, topology
from jdml.communicate import ErrorFeedback
from jdml.communicate.codecs import Codec


@pytest.mark.parametrize(
    "name", [name for name in get_args(CodecName) if name not in ("none", "power_sgd")]
)
def test_a_codec_is_made_and_feeds_back_its_error_if_that_is_a_contraction(name):
    made = content(Config(codec=name))
    assert isinstance(made, Codec if name in UNBIASED else ErrorFeedback)
    assert isinstance(content(Config(codec=name, error_feedback=False)), Codec)
    assert run_name(Config(codec=name)).endswith("-ef") == (name not in UNBIASED)
    assert topology(Config(codec=name)) == ("all_gather" if name in SPARSE else "two_phase")
    if name in BLOCKED:
        inner = content(Config(codec=name, block=2048, error_feedback=False))
        assert inner.block == 2048
    else:
        with pytest.raises(ValueError, match="has no blocks"):
            content(Config(codec=name, block=2048))


def test_runs_have_names_of_their_own():
    assert run_name(Config()) == "int8-256-ef"
    assert run_name(Config(codec="power_sgd", rank=2)) == "power_sgd-2"
    assert content(Config(codec="none")) is None
    names = [run_name(Config(codec=name)) for name in get_args(CodecName)]
    assert len(set(names)) == len(names)
