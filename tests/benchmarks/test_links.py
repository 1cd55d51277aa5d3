"""The bytes that the kernel counts agree with the formulas that the library claims."""

import importlib.util
import math

import pytest

from benchmarks import links
from benchmarks.links_picture import draw
from benchmarks.namespaces import NamespacesUnavailable

pytestmark = pytest.mark.slow

# Ethernet, IP and TCP headers take 66 of every 1514 bytes, acknowledgements one more header for
# two packets; the two barriers around a round send a few small messages to every other worker.
FRAMING = 1.07
BARRIER_BYTES = 3000
STEP = math.sqrt(2 / 12) / 127


def measure(num_workers: int, side: int, methods: tuple[str, ...]):
    options = links.Options(
        num_workers=num_workers,
        megabits_per_s=None,
        side=side,
        num_rounds=3,
        num_warm_up=1,
        methods=methods,
        timeout_s=120,
    )
    try:
        return links.run(options)
    except NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces on this machine: {reason}")


def assert_sent(measured, share: float, num_workers: int, num_elements: int) -> None:
    """``share``: bytes per element, of which a worker sends 2·(n-1)/n."""
    formula = 2 * (num_workers - 1) / num_workers * share * num_elements
    assert formula <= measured.sent_bytes <= FRAMING * formula + BARRIER_BYTES * num_workers


@pytest.mark.parametrize("num_workers", [2, 3])
def test_exact_and_int8_send_what_the_formulas_say(num_workers):
    side = 96 * num_workers  # chunks of whole blocks
    measured = measure(num_workers, side, ("exact", "int8"))
    num_elements = 4 * side**2
    assert_sent(measured["exact"], 4, num_workers, num_elements)
    assert measured["exact"].relative_error < 1e-6
    assert_sent(measured["int8"], 1 + 4 / 256, num_workers, num_elements)
    # Rounding to a step of max/127 has an rms error of max/127/sqrt(12), twice (each worker's
    # share, then the mean), and the largest of 256 normal values lies within 2 and 4.5 sigma.
    assert 2 * STEP < measured["int8"].relative_error < 4.5 * STEP


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorch_takes_turns_in_the_same_namespaces():
    side = 128
    measured = measure(2, side, ("exact", *links.THEIRS))
    num_elements = 4 * side**2
    for name, share in {"all_reduce": 4, "f32": 4, "fp16": 2, "bf16": 2}.items():
        assert_sent(measured[f"torch {name}"], share, 2, num_elements)
    # All-gather: each of n sends its bytes to n - 1 others, for two workers as a ring does.
    assert_sent(measured["torch int8 per tensor"], 1, 2, num_elements)
    assert_sent(measured["torch int8 per 512"], 1 + 8 / 512, 2, num_elements)
    # Four matrices, two factors of rank 4 each.
    assert_sent(measured["torch PowerSGD 4"], 4, 2, 4 * 2 * side * 4)
    assert measured["torch f32"].relative_error < 1e-6
    assert measured["torch bf16"].relative_error < 1e-2


def test_targets_are_judged_by_the_rows_that_were_measured():
    def row(sent: float, seconds: float) -> links.Measured:
        return links.Measured(sent, seconds, 0.0)

    measured = {"exact": row(100, 1.1), "torch all_reduce": row(100, 1.0), "int8": row(25.4, 0.3)}
    ((line, met),) = links.verdicts(measured)
    assert met
    assert "0.254" in line
    ((line, met),) = links.verdicts(measured | {"int8": row(25.4, 0.33)})
    assert not met
    assert "MISSED" in line
    assert not links.verdicts({"exact": row(100, 1.1), "int8": row(25.4, 0.3)})


def test_the_picture_has_a_row_for_each_method(tmp_path):
    pytest.importorskip("matplotlib")
    measured = {
        "exact": links.Measured(1e6, 1.0, 0.0, predicted=0.9),
        "torch f32": links.Measured(1e6, 1.0, 0.0),
    }
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    draw(dict(list(measured.items())[:1]), "one", small)
    draw(measured, "two", large)
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (small, large)]
    assert heights[0] < heights[1]


def test_an_unknown_method_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"int9.*expected one of"):
        links.runnable(links.Options(methods=("int9",)))
