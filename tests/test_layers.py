"""The layer rule: arrows run one way, and the ground floor knows nothing of the house.

``sharding`` <- ``models``; ``sharding`` <- {``partition``, ``optimize``, ``communicate``} <-
``aggregate`` <- ``train`` <- {``plan``, ``experiments``}; {``models``, ``optimize``} <-
``train/estimators``, a floor of its own that nothing else imports.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_MODULES = {"partition", "optimize", "communicate"}
_TRAINING = {"sharding", "aggregate", "train"} | _MODULES
# What each part of jdml may import besides itself; the key "" is jdml/__init__.py.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "sharding": set(),
    "models": {"sharding"},
    "partition": {"sharding"},
    "optimize": {"sharding"},
    "communicate": {"sharding"},
    "aggregate": {"sharding"} | _MODULES,
    "train": {"sharding", "aggregate"} | _MODULES,
    "train.estimators": {"models", "optimize"},
    "plan": _TRAINING | {"models"},
    "launch": {"sharding"},
}
NOT_INSTALLED = {"experiments", "tests", "benchmarks"}
# The links at the top are for readers; imported, they would be second copies of the same modules.
LINKS = {"sharding", "models"}


def imported_names(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """``(line, dotted name)`` of everything that a module imports, relative names resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def part_of(module: str) -> str:
    """``jdml.train.step`` -> ``train``; ``jdml`` -> ``""``; ``train.estimators`` as it is."""
    names = module.split(".")[1:]
    folder = ".".join(names[:2])
    return folder if folder in ALLOWED else [*names, ""][0]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the module imports against the rule, one line each."""
    top, here = module.split(".")[0], part_of(module)
    if top == "jdml" and here not in ALLOWED:
        return [f"{module}: jdml.{here} has no layer; give it one in tests/test_layers.py"]
    broken = []
    for line, name in imported_names(source, module, is_package):
        imported_top, there = name.split(".")[0], part_of(name)
        if imported_top in LINKS:
            wrong = f"write jdml.{imported_top}"
        elif imported_top in NOT_INSTALLED - {"benchmarks"} and top == "jdml":
            wrong = "the library imports nothing that is not installed"
        elif imported_top == "benchmarks" and top in {"jdml", "experiments"}:
            wrong = "benchmarks stand outside"
        elif imported_top == "tests" and top != "tests":
            wrong = "nothing imports the tests"
        elif imported_top == "jdml" and top == "jdml":
            # `from jdml import __version__` names no part: the root imports none, so that is safe,
            # save for the ground floor, which must be able to stand alone.
            if there == here or there in ALLOWED[here]:
                continue
            if there not in ALLOWED and here != "sharding":
                continue
            wrong = f"jdml.{here} may import {sorted(ALLOWED[here]) or 'nothing'} of jdml"
        else:
            continue
        broken.append(f"{module}:{line} imports {name}: {wrong}")
    return broken


def sources() -> list[tuple[str, bool, Path]]:
    """``(module, is it a package, file)`` of all Python files of the repository, links left out."""
    found = []
    for top in ("jdml", "experiments", "benchmarks", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            found.append((".".join(parts[:-1] if is_package else parts), is_package, path))
    return found


def test_every_import_follows_the_arrows():
    broken = [
        line
        for module, is_package, path in sources()
        for line in violations(path.read_text(encoding="utf-8"), module, is_package)
    ]
    assert not broken, "\n".join(broken)


def test_every_part_is_looked_at():
    seen = {part_of(module) for module, _, _ in sources() if module.split(".")[0] == "jdml"}
    folders = {path.name for path in (ROOT / "jdml").iterdir() if (path / "__init__.py").exists()}
    assert folders <= seen
    assert {"sharding", "models", "communicate", "aggregate", "train"} <= seen


def test_the_table_has_no_way_back():
    """No part can reach itself: the arrows run one way whatever is written in the table."""
    for start in ALLOWED:
        reached, waiting = set(), list(ALLOWED[start])
        while waiting:
            part = waiting.pop()
            if part not in reached:
                reached.add(part)
                waiting += ALLOWED[part]
        assert start not in reached


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jdml.sharding.mesh", "import jdml.communicate"),
        ("jdml.sharding.mesh", "from jdml import __version__"),
        ("jdml.sharding.mesh", "from ..communicate import codecs"),
        ("jdml.sharding.mesh", "from .. import communicate"),
        ("jdml.models.mlp", "from jdml.train import make_step"),
        ("jdml.models.mlp", "from jdml.optimize import proximal"),
        ("jdml.train.step", "from jdml.models import transformer"),
        ("jdml.train.step", "from jdml import models"),
        ("jdml.train.step", "def later():\n    import jdml.models.transformer as t"),
        ("jdml.train.step", "import importlib\nimportlib.import_module('jdml.models')"),
        ("jdml.train.step", "if TYPE_CHECKING:\n    from jdml.plan import cost"),
        ("jdml.communicate.wire", "from jdml.aggregate import gossip"),
        ("jdml.communicate.wire", "from jdml.partition import data"),
        ("jdml.aggregate.vote", "from ..train.step import make_step"),
        ("jdml.train.loop", "from experiments.train_lm import config"),
        ("jdml.train.loop", "from tests.train import problems"),
        ("jdml.train.loop", "import benchmarks.links"),
        ("jdml.train.loop", "from jdml.train.estimators import Ridge"),
        ("jdml.train.estimators.svm", "from jdml.train.step import make_step"),
        ("jdml.train.loop", "from sharding import make_mesh"),
        ("experiments.train_lm.run", "import models.transformer"),
        ("experiments.train_lm.run", "from tests.train import problems"),
        ("experiments.train_lm.run", "import benchmarks"),
        ("benchmarks.links", "import tests.conftest"),
        ("jdml.novelty.thing", "import numpy"),
    ],
)
def test_a_violation_is_seen(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jdml.sharding.mesh", "import jax\nfrom jdml.sharding.paths import path_str"),
        ("jdml.sharding.mesh", "from .paths import path_str\nfrom . import paths"),
        ("jdml.models.mlp", "from jdml.sharding import constrain\nfrom ..sharding import Rules"),
        ("jdml.aggregate.mean", "from jdml.communicate import codecs"),
        ("jdml.train.step", "from jdml import __version__, communicate"),
        ("experiments.train_lm.run", "from jdml.models import transformer\nimport jdml.train"),
        ("jdml.train.estimators.svm", "from jdml.models.linear import hinge\nimport jdml.optimize"),
        ("tests.train.test_step", "from tests.train import problems\nimport experiments"),
        ("jdml.models.mlp", "from flax.linen import sharding\nimport torchvision.models"),
    ],
)
def test_what_follows_the_rule_passes(module, source):
    assert not violations(source, module)


def test_a_package_resolves_its_own_dots():
    assert violations("from ..communicate import codecs", "jdml.sharding", is_package=True)
    assert not violations("from .paths import path_str", "jdml.sharding", is_package=True)
