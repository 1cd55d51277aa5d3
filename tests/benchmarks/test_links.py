"""The bytes that the kernel counts agree with the formulas that the library claims."""

import math

import pytest

from benchmarks import links
from benchmarks.namespaces import NamespacesUnavailable

pytestmark = pytest.mark.slow

# Ethernet, IP and TCP headers take 66 of every 1514 bytes, acknowledgements one more header for
# two packets; the two barriers around a round send a few small messages to every other worker.
FRAMING = 1.07
BARRIER_BYTES = 3000
STEP = math.sqrt(2 / 12) / 127


def measure(num_workers: int, num_elements: int, blocks: tuple[int, ...]):
    options = links.Options(
        num_workers=num_workers,
        megabits_per_s=None,
        num_elements=num_elements,
        num_rounds=3,
        num_warm_up=1,
        blocks=blocks,
        timeout_s=120,
    )
    try:
        return links.run(options)
    except NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces on this machine: {reason}")


def assert_sent(measured, formula: float, num_workers: int) -> None:
    assert formula <= measured.sent_bytes <= FRAMING * formula + BARRIER_BYTES * num_workers


@pytest.mark.parametrize("num_workers", [2, 3])
def test_exact_and_int8_send_what_the_formulas_say(num_workers):
    num_elements = num_workers * 64 * 1024
    measured = measure(num_workers, num_elements, blocks=(256, 1024))
    exact = measured["exact"]
    assert_sent(exact, links.exact_bytes(num_elements, num_workers), num_workers)
    assert exact.relative_error < 1e-6
    for block in (256, 1024):
        int8 = measured[f"int8 block={block}"]
        assert_sent(int8, links.int8_bytes(num_elements, num_workers, block), num_workers)
        # Rounding to a step of max/127 has an rms error of max/127/sqrt(12), twice (each worker's
        # share, then the mean), and the largest of 1024 normal values lies within 2.2 and 5 sigma.
        assert 2.2 * STEP < int8.relative_error < 5 * STEP
