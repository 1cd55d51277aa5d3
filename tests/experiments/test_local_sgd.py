"""The local SGD experiment, small: its bytes, its report, a second call that trains nothing."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.local_sgd import run
from experiments.local_sgd.config import Config
from experiments.local_sgd.methods import (
    DILOCO,
    E3M0,
    FEEDBACK,
    METHODS,
    STREAMING,
    SYNCHRONOUS,
    chain,
)
from experiments.local_sgd.report import exchanged
from experiments.local_sgd.search import candidates
from jdml.communicate import Link, predict
from jdml.communicate.codecs import e3m0_row
from jdml.models import TransformerConfig

LINK = Link(latency=0.0, bandwidth=1.0)
CHOSEN = (SYNCHRONOUS, DILOCO + E3M0, STREAMING)
TINY = TransformerConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, remat="none"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local_sgd")
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], 4000)
    (folder / "text.txt").write_text(" ".join(words))
    return Config(
        out=folder / "out",
        data=folder / "text.txt",
        methods=CHOSEN,
        model=TINY,
        workers=4,
        steps=100,
        batch=4,
        seq_len=16,
        warmup_steps=5,
        eval_every=50,
        eval_batches=2,
        save_every=0,
    )


@pytest.fixture(scope="module")
def rows(config):
    return run.compare(config, Console(quiet=True))


@pytest.mark.slow
def test_bytes_are_those_of_the_rounds(config, rows):
    assert list(rows) == list(CHOSEN)
    workers, steps = config.workers, config.steps
    model = round(2 * (workers - 1) / workers * 4 * TINY.num_params)
    loss = round(2 * (workers - 1) / workers * 4)  # the mean training loss, in every step
    assert rows[SYNCHRONOUS][-1]["bytes_sent"] == steps * (model + loss)
    # Fragments end their second round at steps 67, 80, 92 and after the run: all but one twice.
    sent = [row["bytes_per_step"] - loss for row in rows[STREAMING]]
    at = [row["step"] for row, x in zip(rows[STREAMING], sent, strict=True) if x]
    assert at == [17, 30, 42, 55, 67, 80, 92]
    assert sum(sent[:55]) == model
    at = {row["step"]: row["bytes_per_step"] - loss for row in rows[DILOCO + E3M0]}
    assert [step for step, sent in at.items() if sent] == [50, 100]
    assert at[50] == at[100]
    assert at[50] == predict("two_phase", workers, TINY.num_params, e3m0_row(), LINK).sent_bytes
    assert model / 8 <= at[50] < model / 7.99  # half a byte an element; a row may want one more
    for name in CHOSEN:
        last = rows[name][-1]
        assert exchanged(config, last) == last["bytes_sent"] - steps * loss
        per_step = {row["bytes_per_step"] for row in rows[name]}
        assert min(per_step) == (loss if name != SYNCHRONOUS else model + loss)
    for name in CHOSEN:
        evaluated = [row["step"] for row in rows[name] if "val_loss" in row]
        assert evaluated == [50, 100]
        # By step 50 the best have learned what there is to learn in this text.
        assert rows[name][-1]["val_loss"] < 0.5 * rows[name][0]["loss"]


@pytest.mark.slow
def test_a_second_call_reads_what_is_finished(config, rows, monkeypatch):
    monkeypatch.setattr(run, "make_step", None)  # nothing is trained
    assert run.compare(config, Console(quiet=True)) == rows
    report = config.out / "report"
    table = (report / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(CHOSEN)
    assert f"{rows[SYNCHRONOUS][-1]['val_loss']:.4f}" in table[2]
    assert "target: 1 / 400" in (report / "summary.txt").read_text()
    assert (report / "local_sgd.png").stat().st_size > 10_000
    lines = (config.out / run.slug(SYNCHRONOUS) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == rows[SYNCHRONOUS]
    # A run of another configuration in this folder is refused, and named.
    with pytest.raises(ValueError, match="clip"):
        run.compare(dataclasses.replace(config, clip=2.0), Console(quiet=True))


def test_names_and_searches():
    folders = [run.slug(name) for name in METHODS]
    assert len(set(folders)) == len(METHODS)
    assert run.slug(DILOCO + E3M0) == "DiLoCo-H50-e3m0"
    searched = {name: candidates(method) for name, method in METHODS.items()}
    assert {len(found) for found in searched.values()} == {0, 6}  # equal effort, none for e3m0
    for name, found in searched.items():
        for _, method in found:
            assert chain(Config(), method).init
        if found:  # what is trained was among what was tried
            assert METHODS[name] in [method for _, method in found]
        else:
            plain = METHODS[name.removesuffix(FEEDBACK).removesuffix(E3M0)]
            feedback = name.endswith(FEEDBACK)
            again = dataclasses.replace(plain, compressed=True, feedback=feedback)
            assert again == METHODS[name]
    assert Config().quickly().steps == 128


@pytest.mark.parametrize(
    ("change", "message"), [({"steps": 0}, "--steps must be"), ({"methods": ("H=3",)}, "'H=3'")]
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
