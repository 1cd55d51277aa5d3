"""Speed, size and error of every codec, on one core: ``python -m benchmarks.codecs [name ...]``.

Encoding and decoding 16 MB of f32, by the processor time that they take on one core, so that a busy
machine slows no one. The least of many tries. Target: at least 5 GB/s there and back for int8 and
one_bit.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jdml.communicate.codecs import (
    Codec,
    bf16,
    e3m0,
    fp8,
    identity,
    int2,
    int4,
    int8,
    one_bit,
    qsgd,
    random_k,
    terngrad,
    threshold,
    top_k,
)

NUM_WORKERS = 4
NUM_ELEMENTS = 1 << 22
GIGABYTES = NUM_ELEMENTS * 4 / 1e9
TARGET = 5.0

CODECS: dict[str, Codec] = {
    "identity": identity(),
    "bf16": bf16(),
    "int8": int8(),
    "int8, two-sided": int8(scaling="two_sided"),
    "int8, stochastic": int8(rounding="stochastic"),
    "fp8 e4m3": fp8(),
    "fp8 e5m2": fp8("e5m2"),
    "qsgd 127": qsgd(127),
    "int4": int4(),
    "int4, two-sided": int4(scaling="two_sided"),
    "int4, stochastic": int4(rounding="stochastic"),
    "e3m0": e3m0(),
    "qsgd 7": qsgd(7),
    "int2": int2(),
    "terngrad": terngrad(),
    "terngrad, clipped at 2.5": terngrad(clip=2.5),
    "one_bit": one_bit(),
    "one_bit, mean per sign": one_bit(scale="mean_per_sign"),
    "top_k 1 %": top_k(0.01),
    "top_k 1 %, int8": top_k(0.01, int8()),
    "random_k 1 %": random_k(0.01),
    "threshold 2.5, at most 2 %": threshold(2.5, 0.02),
}
ASKED_OF = ("int8", "one_bit")


class Figures(NamedTuple):
    """Seconds to encode, to decode, to decode and add four shares; bits per element; error."""

    encode: float
    decode: float
    add: float
    bits: float
    error: float


def cpu_seconds(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Least processor time of all tries within about ``seconds`` of it, and at least ten."""
    jax.block_until_ready(run())
    tries: list[float] = []
    while len(tries) < 10 or sum(tries) < seconds:
        start = time.process_time()
        jax.block_until_ready(run())
        tries.append(time.process_time() - start)
    return min(tries)


def measure(codec: Codec) -> Figures:
    length = NUM_ELEMENTS + -NUM_ELEMENTS % codec.granularity
    x = jax.random.normal(jax.random.key(0), (1, length))
    key = jax.random.key(1)
    encode = jax.jit(lambda x: codec.encode_rows(x, key))
    decode = jax.jit(lambda payload: codec.decode_rows(payload, length))
    payload = encode(x)
    error = jnp.linalg.norm(decode(payload) - x) / jnp.linalg.norm(x)

    part = -(-length // (NUM_WORKERS * codec.granularity)) * codec.granularity
    shares = jax.random.normal(jax.random.key(2), (NUM_WORKERS, part))
    shares = jax.jit(lambda x: codec.encode_rows(x, key))(shares)
    add = jax.jit(lambda payload: codec.decode_sum(payload, part))
    return Figures(
        cpu_seconds(lambda: encode(x)),
        cpu_seconds(lambda: decode(payload)),
        cpu_seconds(lambda: add(shares)),
        8 * codec.payload_bytes(length) / length,
        float(error),
    )


def keep_to_one_core() -> None:
    """Before JAX counts them; with several, the time of other threads is booked late."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def main() -> None:
    keep_to_one_core()
    console = Console(width=100)
    console.print(
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}, {jax.default_backend()}"
    )
    unknown = set(sys.argv[1:]) - set(CODECS)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not among {', '.join(CODECS)}")
    table = Table(
        title="Codecs: 16 MB of f32, Gaussian, GB/s of f32 per core",
        caption=f"add: decodes and adds the shares of {NUM_WORKERS} workers, all bytes counted\n"
        f"target: {' and '.join(ASKED_OF)} at least {TARGET:g} GB/s there and back",
    )
    for column in ("codec", "encode", "decode", "both", "add", "bits", "of f32", "error"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    missed = []
    for name in sys.argv[1:] or CODECS:
        figures = measure(CODECS[name])
        both = GIGABYTES / (figures.encode + figures.decode)
        if name in ASKED_OF and both < TARGET:
            missed.append(name)
        table.add_row(
            name,
            *(f"{GIGABYTES / s:.1f}" for s in (figures.encode, figures.decode)),
            f"{both:.1f}",
            f"{GIGABYTES / figures.add:.1f}",
            f"{figures.bits:.3f}",
            f"{figures.bits / 32:.4f}",
            f"{figures.error:.4f}",
        )
    console.print(table)
    if missed:
        raise SystemExit(f"below the target: {', '.join(missed)}")


if __name__ == "__main__":
    main()
