"""Ranking, refusals, and what is printed and written."""

import dataclasses
import json

import pytest
from rich.console import Console

from jdml.models import TransformerConfig
from jdml.plan import Case, Layout, make_plan, parse_algorithm, parse_topology
from jdml.plan import __main__ as command
from jdml.plan.picture import draw
from jdml.plan.report import show, to_json


@pytest.fixture
def case(config):
    return Case(config, parse_topology("h100:8"), 16, 64, parse_algorithm("exact"))


def test_meshes_are_ranked_by_time_those_that_fit_first(case):
    plan = make_plan(case)
    assert len(plan.ranked) > 5
    times = [one.seconds for one in plan.ranked if one.fits]
    assert times == sorted(times)
    assert not plan.compiled
    assert not plan.note


def test_gpus_are_by_formula_alone_and_it_says_so(case):
    plan = make_plan(case, num_compiled=2)
    assert "TPUs only" in plan.note
    assert not plan.compiled


def test_without_libtpu_by_formula_alone_and_how_to_install(case, monkeypatch):
    monkeypatch.setattr("jdml.plan.planner.has_libtpu", lambda: False)
    monkeypatch.setattr("jdml.plan.program.has_libtpu", lambda: False)
    on_tpu = dataclasses.replace(case, topology=parse_topology("v5e:2x4"))
    plan = make_plan(on_tpu, num_compiled=1)
    assert "pip install 'jdml[tpu]'" in plan.note
    with pytest.raises(ValueError, match="libtpu is not installed"):
        on_tpu.compile(Layout(8))


def test_a_model_that_fits_nowhere_says_how_many_bytes_are_missing_and_what_helps():
    config = TransformerConfig(
        vocab_size=128_256, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8,
        head_dim=128, mlp_dim=14_336, dtype="bfloat16", remat="none",
    )  # fmt: skip
    case = Case(config, parse_topology("v5e:4x4"), 32, 2048, parse_algorithm("exact"))
    tried = [Layout(1, 2, 8), Layout(1, 4, 4), Layout(1, 16, 1)]
    with pytest.raises(ValueError, match=r"fit on no mesh of v5e:4x4") as info:
        make_plan(case, only=tried)
    text = str(info.value)
    smallest = min(map(case.predict, tried), key=lambda one: one.memory.total)
    missing = smallest.memory.total - smallest.capacity
    assert f"{missing:,} bytes more" in text
    for word in ("remat='full'", "a batch of", "sequences of 1024 tokens", "more chips"):
        assert word in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq": 4096}, "max_seq_len=2048"),
        ({"seq": 0}, "max_seq_len=2048"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_sizes_are_checked(case, change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(case, **change)


def test_a_mesh_that_does_not_divide_is_refused(case):
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        case.predict(Layout(1, 1, 8))


@pytest.mark.parametrize("name", ["int9", "diloco", "diloco:0", "exact:3", "local_sgd:x"])
def test_unknown_algorithms(name):
    with pytest.raises(ValueError, match="expected one of exact, int8"):
        parse_algorithm(name)


def test_tables_json_and_picture_say_the_same(case, tmp_path):
    plan = make_plan(case)
    console = Console(record=True, width=140)
    show(plan, console)
    text = console.export_text()
    written = json.loads(json.dumps(to_json(plan)))
    assert len(written["ranked"]) == len(plan.ranked)
    first = written["ranked"][0]
    assert first["mesh"] == plan.ranked[0].layout.sizes
    assert f"{1e3 * first['seconds']['step']:.1f}" in text
    assert first["memory_bytes"]["total"] == sum(
        size for name, size in first["memory_bytes"].items() if name != "total"
    )
    draw(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size < 120_000


def test_the_command_writes_what_was_asked_for(tmp_path, config, capsys):
    model = tmp_path / "model.json"
    model.write_text(json.dumps(dataclasses.asdict(config)))
    out = tmp_path / "plan.json"
    options = command.Options(
        model=str(model), topology="a100:4", batch=8, seq=64, mesh=("1x4x1", "2x1x2"), json=out
    )
    command.main(options)
    printed = capsys.readouterr().out
    assert "TPUs only" in printed
    assert {tuple(one["mesh"].values()) for one in json.loads(out.read_text())["ranked"]} == {
        (1, 4, 1),
        (2, 1, 2),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "llama9"}, "llama3-8b"),
        ({"model": "llama3-9b"}, "8b, 70b"),
        ({"mesh": ("1x2",)}, "as in 1x64x4"),
        ({"model": "mixtral-9x9b"}, "8x7b, 8x22b"),
        ({"schedule": "2f2b"}, "zero_bubble"),
        ({"topology": "v9:4x4"}, "unknown chip"),
    ],
)
def test_the_command_says_what_it_understands(change, words):
    with pytest.raises(ValueError, match=words):
        command.main(command.Options(**change))
