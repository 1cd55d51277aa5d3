"""The repository as it is checked out: the links at its top, and what make says when it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"sharding": "jdml/sharding", "models": "jdml/models"}


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_top_level_links_point_into_the_package(link, target):
    assert (ROOT / link).is_symlink()
    assert os.readlink(ROOT / link) == target  # relative: it must hold in any checkout
    assert (ROOT / link / "__init__.py").samefile(ROOT / target / "__init__.py")


def test_links_and_executables_are_stored_as_such():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "ls-files", "-s", *LINKS, ".ci/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"git cannot read this checkout: {done.stderr.strip()}")
    modes = {line.split("\t")[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert modes == {"sharding": "120000", "models": "120000", ".ci/run": "100755"}


@pytest.fixture
def clone(tmp_path):
    """A folder with what make reads, and a maker of pretended interpreters."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def pretend(script: str) -> Path:
        path = tmp_path / "pretended"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return tmp_path, pretend


def make(folder: Path, python: Path | str, target: str = "lint") -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", target, f"PYTHON={python}"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_names_a_python_that_is_not_there(clone):
    folder, _ = clone
    done = make(folder, "no-such-python")
    assert done.returncode != 0
    assert "no-such-python: not found. Install Python 3.11 or newer" in done.stdout
    assert not list(folder.glob(".venv*"))


def test_make_names_a_python_that_is_too_old(clone):
    folder, pretend = clone
    # Answers as an interpreter of 3.10 does to the two questions that make asks.
    old = pretend('case "$2" in *print*) echo 3.10;; *3,\\ 11*) exit 1;; esac')
    done = make(folder, old)
    assert done.returncode != 0
    assert f"jdml needs Python 3.11 or newer; {old} is 3.10" in done.stdout
    assert not list(folder.glob(".venv*"))


def test_make_names_a_shim_that_does_not_start(clone):
    folder, pretend = clone
    done = make(folder, pretend("echo 'no such version' >&2; exit 127"))
    assert done.returncode != 0
    assert "does not start" in done.stdout
    assert not list(folder.glob(".venv*"))


def test_make_names_the_package_that_brings_venv(clone):
    folder, pretend = clone
    without = pretend(f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"')
    done = make(folder, without)
    version = "{}.{}".format(*sys.version_info)
    assert done.returncode != 0
    assert f"apt install python{version}-venv" in done.stdout
    assert not list(folder.glob(".venv*"))


def test_make_clean_needs_no_python_and_keeps_runs(clone):
    folder, _ = clone
    for name in (".venv-3.11", ".cache", "runs", "jdml/__pycache__"):
        (folder / name).mkdir(parents=True)
    assert make(folder, "no-such-python", "clean").returncode == 0
    assert (folder / "runs").is_dir()
    assert not any((folder / name).exists() for name in (".venv-3.11", ".cache"))
    assert not (folder / "jdml/__pycache__").exists()
