"""Pictures of the ADMM experiment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
SHOWN = ("rho 1", "rho 10, adaptive")
"""Variants whose residuals are shown, where they were tried."""


def residuals(rows: Rows, agree: float, path: Path) -> None:
    """Residuals with their tolerances of two variants, and the objective of all; per problem."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(r["problem"] for r in rows))
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    figure = Figure(figsize=(11.5, 3.1 * len(problems) + 0.6), layout="constrained")
    panels = figure.subplots(len(problems), 3, squeeze=False)
    for problem, (*of_residuals, of_gap) in zip(problems, panels, strict=True):
        for panel, variant in zip(of_residuals, SHOWN, strict=True):
            mine = [r for r in rows if (r["problem"], r["variant"]) == (problem, variant)]
            rounds = [r["round"] for r in mine]
            for name, colour in (("primal", "C0"), ("dual", "C1")):
                panel.plot(
                    rounds, [r[f"admm_{name}"] for r in mine], colour, label=f"{name} residual"
                )
                panel.plot(
                    rounds,
                    [r[f"admm_{name}_tolerance"] for r in mine],
                    colour,
                    linestyle=":",
                    label=f"{name} tolerance",
                )
            stop = next((r["round"] for r in mine if r["admm_converged"] == 1), None)
            if stop:
                panel.axvline(stop, color="0.4", lw=1)
                panel.annotate(
                    f"stopping test, round {stop}",
                    (stop, 0.97),
                    xycoords=("data", "axes fraction"),
                    xytext=(4, 0),
                    textcoords="offset points",
                    fontsize=8,
                    va="top",
                )
            panel.set_title(f"{problem}, {variant}", fontsize=10)
            panel.set_yscale("log")
            panel.set_ylim(bottom=1e-9)
            panel.grid(alpha=0.3)
        for number, variant in enumerate(variants):
            mine = [r for r in rows if (r["problem"], r["variant"]) == (problem, variant)]
            gaps = np.maximum(np.abs([r["gap"] for r in mine]), 1e-16)
            style = "--" if "adaptive" in variant else "-"
            of_gap.plot(
                [r["round"] for r in mine], gaps, f"C{number}", linestyle=style, label=variant
            )
        of_gap.axhline(agree, color="0.4", lw=1)
        of_gap.set_yscale("log")
        of_gap.set_ylim(3e-17, 10)
        of_gap.set_title(f"{problem}: relative difference", fontsize=10)
        of_gap.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("rounds")
    panels[0][0].legend(fontsize=7, loc="lower left")
    figure.legend(
        *panels[0][2].get_legend_handles_labels(),
        title="relative difference of the objective from the exact solver's",
        loc="outside lower right",
        ncols=4,
        fontsize=7,
        title_fontsize=8,
    )
    figure.savefig(path, dpi=67, pil_kwargs={"optimize": True})


def network(rows: Rows, methods: Sequence[str], path: Path) -> None:
    """Test error against rounds and against steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    last = max(r["round"] for r in rows if r["method"] == methods[0])
    for column, panel in zip(("round", "steps"), panels, strict=True):
        for number, method in enumerate(methods):
            mine = [r for r in rows if r["method"] == method]
            seeds = dict.fromkeys(r["seed"] for r in mine)
            xs = list(dict.fromkeys(r[column] for r in mine))
            errors = np.array(
                [[100 * (1 - r["accuracy"]) for r in mine if r["seed"] == s] for s in seeds]
            )
            # As many points of each curve, where synchronous SGD has one for every step.
            thin = slice(None, None, -(-len(xs) // last) if column == "steps" else 1)
            xs, errors = xs[thin], errors[:, thin]
            panel.plot(xs, errors.mean(0), f"C{number}", lw=1.2, label=method)
            panel.fill_between(
                xs, errors.min(0), errors.max(0), color=f"C{number}", alpha=0.15, lw=0
            )
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50]))
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    panels[0].set_xlim(0, last)
    panels[0].set_xlabel("rounds")
    panels[1].set_xlabel("steps of each worker")
    panels[0].set_ylabel("test error, %")
    panels[0].legend(fontsize=9)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})
