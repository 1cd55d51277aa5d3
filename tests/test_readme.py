"""The README's code runs, and what it links to is there."""

import re
from pathlib import Path

import optax

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_code_runs():
    chains, program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {
        "optax": optax,
        "mean_gradients": mean_gradients,
        "average_params": average_params,
        "error_feedback": error_feedback,
        "int8": int8,
    }
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
