"""What an exchange costs on a link of a given latency and bandwidth, before it is run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.broadcast import num_pieces
from jdml.communicate.collectives.checks import Content, check_content
from jdml.communicate.collectives.payloads import Values
from jdml.communicate.error_feedback import ErrorFeedback


@dataclass(frozen=True)
class Link:
    """What joins each worker to the others.

    Attributes:
      latency: Seconds from the start of a message until its first byte is there.
      bandwidth: Bytes per second that a worker sends while it receives as many.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not self.latency >= 0 or not self.bandwidth > 0:
            raise ValueError(
                f"Link(latency={self.latency!r}, bandwidth={self.bandwidth!r}): expected seconds "
                ">= 0 and bytes per second > 0; 200 Mbit/s are 25e6 bytes per second."
            )


@dataclass(frozen=True)
class Cost:
    """What one exchange costs.

    Attributes:
      num_hops: Messages that have to wait for one another.
      bytes_per_axis: What the worker that sends most sends, along each axis (for
        ``"hierarchical"`` slow and fast; else one).
      link_seconds: Latency of all hops, and the time that their bytes take.
      codec_seconds: Encoding and decoding; 0 where no rate was given.
    """

    num_hops: int
    bytes_per_axis: tuple[int, ...]
    link_seconds: float
    codec_seconds: float

    @property
    def sent_bytes(self) -> int:
        """What the worker that sends most sends."""
        return sum(self.bytes_per_axis)

    @property
    def seconds(self) -> float:
        """Link and codec one after the other."""
        return self.link_seconds + self.codec_seconds


@dataclass(frozen=True)
class _Plan:
    """``passed_bytes`` are those on the longest path, ``coded`` elements encoded or decoded."""

    num_hops: int
    sent_bytes: int
    passed_bytes: int
    coded: float


def predict(
    pattern: str,
    num_workers: int | tuple[int, int],
    num_elements: int,
    codec: Content,
    link: Link | tuple[Link, Link],
    codec_rate: float | None = None,
) -> Cost:
    """Hops, bytes and seconds of one exchange of an f32 vector.

    ``seconds = num_hops * latency + bytes / bandwidth + coded / codec_rate``. The bytes are those
    that the compiled program carries for a vector of this length; a tree of leaves adds what fills
    its leaves up to whole blocks, and a payload of 64 KiB or more what fills it up to whole lines
    (mostly of 128 bytes). An all-reduce, all-gather or all-to-all is taken to send ``K-1``
    messages one after the other for each of its phases, as a ring does.

    Args:
      pattern: A topology of ``all_reduce_mean`` (``"two_phase"`` without a codec is the compiler's
        own all-reduce), ``"all_gather"`` (the collective costs what the topology does),
        ``"reduce_scatter"``, ``"all_to_all"`` or ``"broadcast"``.
      num_workers: K; for ``"hierarchical"`` ``(slow, fast)``.
      num_elements: Elements of ``x`` on each worker.
      codec: As the collective takes it. Error feedback sends nothing more.
      link: Of every worker; for ``"hierarchical"`` perhaps ``(slow, fast)``.
      codec_rate: Bytes of f32 that a worker encodes per second, or decodes; ``None`` to leave that
        out.

    Raises:
      ValueError: an argument is out of range, or the codec is a reducer: what it sends depends on
        the shapes of the leaves (its docstring says it, and ``jdml.sharding.collectives`` reads it
        off the compiled program).

    Reference: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations
    in MPICH", IJHPCA 2005 (latency and bandwidth of each).
    """
    check_content("predict", codec, reducers=True)
    if isinstance(codec, Reducer):
        raise ValueError(
            f"predict: what {codec} sends depends on the shapes of the leaves. Use a codec such as "
            "int8(), or read the compiled program with jdml.sharding.collectives."
        )
    words = codec.codec if isinstance(codec, ErrorFeedback) else codec
    if num_elements < 1:
        raise ValueError(f"predict: num_elements={num_elements}; expected at least 1.")
    if codec_rate is not None and not codec_rate > 0:
        raise ValueError(f"predict: codec_rate={codec_rate}; expected bytes per second > 0.")
    sizes: tuple[int, ...] = num_workers if isinstance(num_workers, tuple) else (num_workers,)
    links = link if isinstance(link, tuple) else (link,) * len(sizes)
    expected = 2 if pattern == "hierarchical" else 1
    if not len(sizes) == len(links) == expected or min(sizes) < 1:
        raise ValueError(
            f"predict: num_workers={num_workers!r} and link={link!r}; {pattern!r} takes "
            + ("(slow, fast) workers and one link or two." if expected == 2 else "one of each.")
        )
    if pattern == "hierarchical":
        plans: tuple[_Plan, ...] = _hierarchical(sizes[0], sizes[1], num_elements, words)
    elif pattern in _PLANS:
        plans = (_PLANS[pattern](sizes[0], num_elements, words),)
    else:
        raise ValueError(f"predict: pattern={pattern!r} is not one of {(*_PLANS, 'hierarchical')}.")
    coded = 4 * sum(plan.coded for plan in plans)
    return Cost(
        num_hops=sum(plan.num_hops for plan in plans),
        bytes_per_axis=tuple(plan.sent_bytes for plan in plans),
        link_seconds=sum(
            plan.num_hops * each.latency + plan.passed_bytes / each.bandwidth
            for plan, each in zip(plans, links, strict=True)
        ),
        codec_seconds=0.0 if codec_rate is None or words is None else coded / codec_rate,
    )


def _row_bytes(codec: Codec | None, elements: float) -> int:
    codec = codec or Values()
    return codec.payload_bytes(codec.whole(math.ceil(elements)))


def _chunk_bytes(k: int, d: int, codec: Codec | None) -> int:
    """Of one of ``k`` parts into which a vector of whole blocks is cut."""
    return _row_bytes(codec, (codec or Values()).whole(d) / k)


def _two_phase(k: int, d: int, codec: Codec | None) -> _Plan:
    sent = -(-8 * (k - 1) * d // k)
    if codec is not None:
        sent = 2 * (k - 1) * _chunk_bytes(k, d, codec)
    return _Plan(2 * (k - 1), sent, sent, 3 * d + d / k if k > 1 else 0)


def _ring(k: int, d: int, codec: Codec | None) -> _Plan:
    sent = 2 * (k - 1) * _chunk_bytes(k, d, codec)
    return _Plan(2 * (k - 1), sent, sent, 3 * d - d / k if k > 1 else 0)


def _tree(k: int, d: int, codec: Codec | None) -> _Plan:
    rounds, whole = k.bit_length() - 1, _row_bytes(codec, d)
    is_folded = k > 1 << rounds
    hops = rounds + 2 * is_folded
    # A worker with a partner to tell the mean hears it first and does not send then.
    return _Plan(hops, (rounds + is_folded) * whole, hops * whole, d * (3 * rounds + 4 * is_folded))


def _all_gather(k: int, d: int, codec: Codec | None) -> _Plan:
    sent = (k - 1) * _row_bytes(codec, d)
    return _Plan(k - 1, sent, sent, d * (k + 1) if k > 1 else 0)


def _scatter(k: int, d: int, codec: Codec | None) -> _Plan:
    sent = (k - 1) * _row_bytes(codec, d / k)
    return _Plan(k - 1, sent, sent, 2 * d if k > 1 else 0)


def _broadcast(k: int, d: int, codec: Codec | None) -> _Plan:
    whole = _row_bytes(codec, d)
    pieces = num_pieces(whole, k)
    hops = (k - 1).bit_length()
    if pieces:
        hops = pieces + k - 2
        word = 4 if codec is None else 1
        whole = math.ceil(whole / word / pieces) * word
    return _Plan(hops, hops * whole, hops * whole, 2 * d if k > 1 else 0)


def _hierarchical(slow: int, fast: int, d: int, codec: Codec | None) -> tuple[_Plan, _Plan]:
    words = codec or Values()
    chunk = words.whole(math.ceil(words.whole(d) / fast))
    across = _two_phase(slow, chunk, words)
    sent = 2 * (fast - 1) * 4 * chunk
    return across, _Plan(2 * (fast - 1), sent, sent, 0)


_PLANS: Mapping[str, Callable[[int, int, Codec | None], _Plan]] = MappingProxyType(
    {
        "two_phase": _two_phase,
        "ring": _ring,
        "tree": _tree,
        "all_gather": _all_gather,
        "reduce_scatter": _scatter,
        "all_to_all": _scatter,
        "broadcast": _broadcast,
    }
)
