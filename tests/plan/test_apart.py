"""Compiling in another process, which may die of it."""

import os
from dataclasses import dataclass

import pytest

from jdml.plan import DoesNotFit, Layout
from jdml.plan.apart import Failed, compile_apart


@dataclass(frozen=True)
class Case:
    """Stands for a case whose compiler does what is asked for."""

    what: str

    def compile(self, layout):
        if self.what == "abort":
            os.abort()
        if self.what == "too large":
            raise DoesNotFit("no room", 7)
        if self.what == "refused":
            raise ValueError("libtpu does not know it")
        return layout


def test_what_does_not_fit_comes_back():
    found = compile_apart(Case("too large"), Layout(4))
    assert isinstance(found, DoesNotFit)
    assert (str(found), found.missing) == ("no room", 7)


@pytest.mark.slow
def test_what_was_found_comes_back():
    assert compile_apart(Case("compile"), Layout(4)) == Layout(4)
    with pytest.raises(ValueError, match="libtpu does not know it"):
        compile_apart(Case("refused"), Layout(4))


def test_a_process_that_ends_leaves_this_one_alone():
    found = compile_apart(Case("abort"), Layout(4))
    assert isinstance(found, Failed)
    assert "signal 6" in str(found)
