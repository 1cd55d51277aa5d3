"""Cost of ``make_step`` against a hand-written ``jax.jit`` step, and of its Python side.

    python -m benchmarks.step

Both sides of each ratio run in turns in one process, so that a busy machine slows both.
"""

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jdml.aggregate import mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import init, make_mesh, presets, use_rules
from jdml.train import make_step

NUM_DEVICES = 8


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, run one after the other ``rounds`` times."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    return times


def stateful(step: Callable[..., Any], state: Any, batch: Any) -> Callable[[], Any]:
    """A step as a function of nothing, which carries its state along."""
    held = [state]

    def run() -> Any:
        held[0], metrics = step(held[0], batch)
        return held[0], metrics

    return run


def transformer_steps(
    mesh: Mesh, config: TransformerConfig, batch_size: int, seq: int
) -> dict[str, Any]:
    """Hand-written, exact and int8 steps of one model with one layout."""
    rules = presets.tensor()
    model = init(lambda: Transformer(config, rngs=nnx.Rngs(0)), mesh, rules)
    graphdef, weights = nnx.split(model)
    params = nnx.to_pure_dict(weights)
    tokens = jax.random.randint(jax.random.key(0), (batch_size, seq + 1), 0, config.vocab_size)
    batch = jax.device_put(
        {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, NamedSharding(mesh, P("data"))
    )
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def loss_fn(params: Any, batch: Any, key: Any = None) -> Any:
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, batch["inputs"], batch["targets"]), {}

    def plain(state: Any, batch: Any) -> Any:
        params, opt_state = state
        with use_rules(mesh, rules):
            loss, gradients = jax.value_and_grad(lambda p: loss_fn(p, batch)[0])(params)
        updates, opt_state = adamw.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    steps, shardings = {}, None
    for name, codec in (
        ("make_step, exact mean", None),
        ("make_step, int8", int8()),
        ("make_step, int8 + error feedback", error_feedback(int8())),
    ):
        init_state, step = make_step(
            loss_fn, optax.chain(mean_gradients("data", codec), adamw), mesh, rules=rules
        )
        state = init_state(params)
        if codec is None:
            own = (state.params, state.opt_state[1])
            shardings = jax.tree.map(lambda x: x.sharding, own)
            hand_state = jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=shardings)(own)
        steps[name] = stateful(step, state, batch)
    hand = jax.jit(plain, out_shardings=(shardings, None), donate_argnums=0)
    return {"hand-written jax.jit": stateful(hand, hand_state, batch)} | steps


def overhead_steps(num_leaves: int) -> dict[str, Any]:
    """Steps of next to no work over many leaves: what is left is Python and dispatch."""
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    params = {f"leaf{i:03d}": jnp.ones((4,)) for i in range(num_leaves)}
    batch = jax.device_put(jnp.ones((1, 4)), NamedSharding(mesh, P("data")))
    adam = optax.adam(1e-3)

    def loss_fn(params: Any, batch: Any, key: Any = None) -> Any:
        return sum(jnp.sum(p * p) for p in params.values()) * jnp.mean(batch), {}

    def plain(state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: loss_fn(p, batch)[0])(state["params"])
        updates, (moments, rest) = adam.update(
            gradients, (optax.ScaleByAdamState(**state["adam"]), state["rest"]), state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "adam": moments._asdict(), "rest": rest}, {"loss": loss}

    moments, rest = adam.init(params)
    plain_state = jax.device_put(
        {"params": params, "adam": moments._asdict(), "rest": rest}, NamedSharding(mesh, P())
    )
    init_state, step = make_step(loss_fn, optax.chain(mean_gradients("data"), adam), mesh)
    return {
        "jax.jit on a dict": stateful(
            jax.jit(plain, donate_argnums=0), jax.tree.map(jnp.copy, plain_state), batch
        ),
        "make_step": stateful(step, init_state(params), batch),
    }


def show(console: Console, title: str, times: dict[str, list[float]], target: str) -> None:
    """A table of medians, and of the median over rounds of the ratio to the first row."""
    table = Table(title=title, caption=target)
    for column in ("step", "median, ms", "ratio"):
        table.add_column(column, justify="left" if column == "step" else "right")
    base = next(iter(times.values()))
    for name, seconds in times.items():
        ratio = statistics.median(t / b for t, b in zip(seconds, base, strict=True))
        table.add_row(name, f"{1e3 * statistics.median(seconds):.2f}", f"{ratio:.3f}")
    console.print(table)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    console = Console()
    console.print(
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}, {jax.default_backend()}"
    )
    mesh = make_mesh({"data": 4, "model": 2})
    config = TransformerConfig()
    steps = transformer_steps(mesh, config, batch_size=32, seq=128)
    show(
        console,
        f"Transformer of {config.num_params:,} parameters, 32 × 128 tokens, data=4 × model=2",
        in_turns(steps, rounds=30),
        "target: exact mean at most 1.05",
    )
    show(
        console,
        "Python and dispatch: 120 parameter leaves, one device",
        in_turns(overhead_steps(120), rounds=300),
        "target: at most 1.3",
    )


if __name__ == "__main__":
    main()
