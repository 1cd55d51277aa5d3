"""The main job as a user runs it: in processes of its own, killed, resumed, misused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.marks import slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/train_lm/run.py"
TINY = [
    *("--model.num-layers", "1", "--model.embed-dim", "16", "--model.num-heads", "2"),
    *("--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.mlp-dim", "32"),
    *("--batch", "8", "--seq-len", "16", "--steps", "8", "--eval-every", "4", "--save-every", "2"),
    *("--eval-batches", "1", "--sample-tokens", "8"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(3):
        words = rng.choice(["alpha", "beta", "gamma", "delta"], 2000)
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def command(out, corpus, *options, launch=()):
    return [
        sys.executable,
        *launch,
        str(SCRIPT),
        "--out",
        str(out),
        "--data",
        str(corpus),
        *TINY,
        *options,
    ]


def environment():
    cache = str(ROOT / ".cache/jax")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def train(out, corpus, *options, launch=(), cwd=None):
    return subprocess.run(
        command(out, corpus, *options, launch=launch),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        check=False,
    )


def digests(out, run, step):
    record = json.loads((out / run / "checkpoints" / str(step) / "record/record.json").read_text())
    return record["record"]["digests"]


def rows(out, run):
    keep = ("step", "loss", "val_loss", "bytes_sent")
    lines = (out / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path, corpus):
    whole = train(tmp_path / "whole", corpus, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "× in bytes" in whole.stdout
    assert "Sample:" in whole.stdout
    report = tmp_path / "whole/report"
    assert {p.name for p in report.iterdir()} == {"metrics.jsonl", "loss.png", "summary.txt"}

    killed, newest = tmp_path / "killed", tmp_path / "killed/int8-256-ef/checkpoints/4"
    deadline = time.monotonic() + 240
    with subprocess.Popen(
        command(killed, corpus), env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        while not (newest / "record").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL

    again = train(killed, corpus)
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stdout
    for run in ("int8-256-ef", "exact"):
        assert digests(tmp_path / "whole", run, 8) == digests(killed, run, 8)
        assert rows(tmp_path / "whole", run) == rows(killed, run)

    # Once more: nothing is left to do. Then with another model: refused, nothing overwritten.
    before = digests(killed, "exact", 8)
    assert train(killed, corpus, "--resume", "must").returncode == 0
    other = train(killed, corpus, "--model.mlp-dim", "48")
    assert other.returncode == 1
    assert "mlp_dim" in other.stderr
    assert digests(killed, "exact", 8) == before


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_fewer_workers(tmp_path, corpus):
    out, options = tmp_path / "out", ("--no-compare", "--batch", "24", "--steps", "400")
    newest = out / "int8-256-ef/checkpoints/2/record"
    with subprocess.Popen(
        command(out, corpus, *options), env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 240
        while not newest.exists() and time.monotonic() < deadline:
            assert process.poll() is None, "ended before it could be stopped"
            time.sleep(0.005)
        process.terminate()
    assert process.returncode == 0
    stopped = max(int(p.name) for p in newest.parents[1].iterdir() if p.name.isdecimal())
    assert stopped < 400

    # Four workers of two devices saved; three of two go on.
    with subprocess.Popen(
        command(out, corpus, *options, "--simulate", "6", "--residual", "mean"),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if "resumed at step" in line:
                assert f"resumed at step {stopped} of 400" in line
            if "int8-256-ef  " in line:  # a step was taken
                break
        else:
            pytest.fail("no step was taken")
        process.terminate()
        process.stdout.read()
    assert process.returncode == 0
    assert rows(out, "int8-256-ef")[stopped]["step"] == stopped + 1


@pytest.mark.slow
def test_several_processes_train_as_one_does(tmp_path, corpus):
    options = ("--codec", "int8", "--no-compare")
    launch = ("-m", "jdml.launch", "-n", "2", "--devices-per-process", "2", "--")
    several = train(tmp_path / "two", corpus, *options, launch=launch)
    assert several.returncode == 0, several.stdout + several.stderr
    one = train(tmp_path / "one", corpus, *options, "--simulate", "4")
    assert one.returncode == 0, one.stderr
    for a, b in zip(
        rows(tmp_path / "one", "int8-256-ef"), rows(tmp_path / "two", "int8-256-ef"), strict=True
    ):
        assert a["bytes_sent"] == b["bytes_sent"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("simulate", ["1", "3"])
def test_runs_on_any_number_of_devices_and_on_tokens(tmp_path, simulate):
    tokens = np.random.default_rng(0).integers(0, 50, 4000).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    options = (
        "--data-dtype",
        "uint16",
        "--vocab-size",
        "50",
        "--batch",
        "6",
        "--codec",
        "none",
        "--model.dtype",
        "bfloat16",
        "--simulate",
        simulate,
        "--accumulate",
        "2",
    )
    done = train(tmp_path / "out", tmp_path / "tokens.bin", *options)
    assert done.returncode == 0, done.stderr
    assert "nats per token" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        slow(("--mesh.data", "3"), "8"),
        slow(("--mesh.data", "-1", "--mesh.model", "-1"), "-1"),
        slow(("--batch", "6"), "6"),
        slow(("--model.num-heads", "3", "--model.num-kv-heads", "3"), "attention/key/kernel"),
        slow(("--data", "/nowhere/at/all"), "/nowhere/at/all"),
        slow(("--seq-len", "100000", "--model.max-seq-len", "100000"), "100001"),
        slow(("--seq-len", "4096"), "max-seq-len"),
        slow(("--resume", "must"), "must"),
        slow(("--out", "/dev/null/out"), "/dev/null/out"),
        (("--block", "0"), "block=0"),
    ],
)
def test_bad_input_is_refused_with_what_and_how(tmp_path, corpus, options, said):
    done = train(tmp_path / "out", corpus, *options)
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1] or said in done.stderr[-600:], done.stderr
    assert "compiled in" not in done.stdout
    assert not list((tmp_path / "out").glob("*/metrics.jsonl"))
