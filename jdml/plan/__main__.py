"""What a run would cost, before it runs: ``python -m jdml.plan --model llama3-8b``."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from jdml.models import TransformerConfig
from jdml.models.transformer import presets
from jdml.models.transformer.config import DIVIDED, Attention
from jdml.plan.algorithm import parse_algorithm
from jdml.plan.layout import Layout, parse_layout
from jdml.plan.picture import draw
from jdml.plan.planner import Case, Found, make_plan
from jdml.plan.program import Compiled, DoesNotFit
from jdml.plan.report import show, to_json
from jdml.plan.topology import parse_topology


@dataclass(frozen=True)
class Options:
    """Lists the meshes that divide, ranks them by a roofline, compiles the best ahead of time."""

    model: str = "llama3-8b"
    """llama3-8b, llama3-70b, mixtral-8x7b, mixtral-8x22b, gpt2-small, -medium, -large, -xl; or a
    JSON file with fields of TransformerConfig."""
    topology: str = "v5e:16x16"
    """CHIP:SHAPE of v5e, v5p, v6e, 2*v5e:16x16 for two slices; a100:N, h100:N, h200:N, b200:N."""
    batch: int = 256
    """Samples of a step, on all chips together."""
    seq: int = 4096
    """Tokens of a sample."""
    algorithm: str = "exact"
    """What the workers exchange: exact, int8, int4, one_bit, local_sgd:EVERY, diloco:EVERY."""
    remat: str | None = None
    """What the backward pass computes again: none, dots, full. By default full for the presets."""
    dtype: str | None = None
    """Of activations and products: bfloat16 or float32. By default bfloat16 for the presets."""
    attention: Attention | None = None
    """full, ring, ulysses or gather. By default the model's own; a sequence that an axis divides
    goes round in a ring."""
    schedule: str = "1f1b"
    """Of pipelines: gpipe, 1f1b, interleaved:CHUNKS, zero_bubble."""
    mesh: tuple[str, ...] = field(default=())
    """Only these: as data x fsdp x model, 1x64x4; or by name, of data, stage, fsdp, expert, seq,
    model and micro_batches: stage=4,fsdp=64,micro_batches=16."""
    compile: int = 1
    """How many of the best to compile; 0 for the formula alone."""
    json: Path | None = None
    """Where to write everything as JSON."""
    picture: Path | None = None
    """Where to draw (.png, .svg, .pdf)."""


def main(options: Options) -> None:
    # A program compiled without its device can be written to JAX's cache and not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console.width = 140
    case = Case(
        model_of(options),
        parse_topology(options.topology),
        options.batch,
        options.seq,
        parse_algorithm(options.algorithm),
        options.schedule,
    )
    plan = make_plan(
        case,
        options.compile,
        [parse_layout(text, options.schedule) for text in options.mesh],
        lambda layout, found: console.print(_line(layout, found), markup=False),
    )
    show(plan, console)
    if options.json is not None:
        options.json.write_text(json.dumps(to_json(plan), indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(plan, options.picture)


def model_of(options: Options) -> TransformerConfig:
    """The configuration that ``--model`` names.

    Raises:
      ValueError: no such preset or file, or fields that do not fit together.
    """
    changes: dict[str, Any] = {
        name: value
        for name, value in (("remat", options.remat), ("dtype", options.dtype))
        if value is not None
    }
    if options.attention is not None:
        changes |= {
            "attention": options.attention,
            "flatten_tokens": options.attention not in DIVIDED,
        }
        order = "zigzag" if options.attention in ("ring", "gather") else "contiguous"
        changes |= {"seq_order": order}
    family, _, size = options.model.partition("-")
    if family in ("llama3", "gpt2", "mixtral") and size:
        defaults = {"remat": "full", "dtype": "bfloat16"}
        preset = getattr(presets, family)(size, **(defaults | changes))
        if preset.positions == "rotary":  # which any number of positions may have
            longest = max(preset.max_seq_len, options.seq)
            preset = dataclasses.replace(preset, max_seq_len=longest)
        return preset
    path = Path(options.model)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(
            f"--model {options.model}: expected llama3-8b, llama3-70b, mixtral-8x7b, "
            "mixtral-8x22b, gpt2-small, gpt2-medium, gpt2-large, gpt2-xl, or a JSON file with "
            "fields of TransformerConfig"
        )
    fields = json.loads(path.read_text(encoding="utf-8"))
    known = {one.name for one in dataclasses.fields(TransformerConfig)}
    if not isinstance(fields, dict) or not fields.keys() <= known:
        raise ValueError(
            f"--model {path}: expected an object with fields of TransformerConfig, "
            f"{', '.join(sorted(known))}; got {fields!r:.200}"
        )
    return TransformerConfig(**(fields | changes))


def _line(layout: Layout, found: Found) -> str:
    if not isinstance(found, Compiled):
        return f"{layout} {'does not fit' if isinstance(found, DoesNotFit) else 'failed'}"
    return f"{layout} compiled in {found.seconds:.0f} s"


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m jdml.plan"))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
