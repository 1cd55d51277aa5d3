"""The README's code runs, and what it links to is there."""

import re
from pathlib import Path

import optax

from jdml import aggregate, communicate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_code_runs():
    chains, program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"optax": optax}
    for module in (aggregate, communicate, communicate.codecs, communicate.topology):
        names |= {name: x for name, x in vars(module).items() if not name.startswith("_")}
    exec(chains, names)
    shown: dict = {}
    exec(program, shown)
    assert shown["metrics"]["loss"] == 1.0
    assert shown["state"].params["w"].shape == (8, 1)


def test_its_links_lead_somewhere():
    for text in (README, (ROOT / "experiments/train_lm/README.md").read_text()):
        base = ROOT if text is README else ROOT / "experiments/train_lm"
        links = [x for x in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in x]
        assert links
        for link in links:
            assert (base / link).exists(), link
