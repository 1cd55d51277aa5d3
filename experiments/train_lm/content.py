"""What the gradients are sent as, from the options."""

from experiments.train_lm.config import Config
from jdml.communicate import codecs, error_feedback
from jdml.communicate.collectives.checks import Content

BLOCKED = ("int8", "int4", "int2", "fp8", "e3m0", "one_bit", "terngrad", "qsgd")
SPARSE = ("top_k", "random_k")
UNBIASED = ("terngrad", "qsgd")
"""Right on average, but their errors are too large to be fed back."""


def content(config: Config) -> Content:
    """The codec of ``--codec`` with its options."""
    name = config.codec
    if config.block is not None and name not in BLOCKED:
        raise ValueError(
            f"--block {config.block}: {name} has no blocks; leave it out, or take one of "
            f"{', '.join(BLOCKED)}."
        )
    if name == "none":
        return None
    if name == "power_sgd":
        return codecs.power_sgd(config.rank)
    make = getattr(codecs, name)
    if name in SPARSE:
        # Small models have small buckets; int8 values halve what is sent.
        codec = make(config.fraction, values=codecs.int8())
    else:
        options = {} if config.block is None else {"block": config.block}
        codec = make(**({"levels": config.levels} if name == "qsgd" else {}), **options)
    return error_feedback(codec) if _feeds_back(config) else codec


def topology(config: Config) -> str:
    """``--topology``, or what suits the codec."""
    return config.topology or ("all_gather" if config.codec in SPARSE else "two_phase")


def run_name(config: Config) -> str:
    """Names the run's folder: codec, its number, and ``ef`` with error feedback."""
    number = {
        "power_sgd": config.rank,
        "qsgd": config.levels,
        **dict.fromkeys(SPARSE, config.fraction),
    }.get(config.codec, 256 if config.codec == "int8" and config.block is None else config.block)
    parts = [config.codec] if number is None else [config.codec, str(number)]
    if _feeds_back(config):
        parts.append("ef")
    return "-".join(parts)


def _feeds_back(config: Config) -> bool:
    return config.error_feedback and config.codec not in (*UNBIASED, "power_sgd", "none")
