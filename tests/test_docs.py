"""The pages show what their code prints; ``JDML_UPDATE_SNAPSHOTS=1`` writes it anew."""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
SLOW = ("communication", "context", "experts", "linear", "partition", "pipeline")
BLOCK = re.compile(r"```(python|text)\n(.*?)```\n", re.DOTALL)


def blocks_of(page):
    """Code blocks and the outputs that follow them, as ``(code, shown or None)``."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    found = []
    for kind, body in blocks:
        if kind == "python":
            found.append([body, None])
        else:
            found[-1][1] = body
    return found


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
        for page in PAGES
    ],
)
def test_outputs_are_true(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    printed = []
    for code, shown in blocks_of(page):
        # All tests have eight devices already; the number can be set only once.
        code = re.sub(r"jax\.config\.update.*", "", code)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(page), "exec"), names)
        text = "".join(line.rstrip() + "\n" for line in out.getvalue().rstrip().splitlines())
        assert bool(text) == (shown is not None), code
        if shown is not None:
            printed.append((shown, text))
    if os.environ.get("JDML_UPDATE_SNAPSHOTS"):
        outputs = iter(text for _, text in printed)

        def renew(match):
            return f"```text\n{next(outputs)}```\n" if match[1] == "text" else match[0]

        page.write_text(BLOCK.sub(renew, page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for shown, text in printed:
            assert shown == text
