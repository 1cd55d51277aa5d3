"""Handwritten digits that come with scikit-learn, divided over workers; for several experiments."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.partition.label_skew import label_skew
from jdml.partition.samples import Sampler, permutation

CLASSES = 10


class Digits(NamedTuple):
    """Images for one run."""

    batches: Iterator[dict[str, jax.Array]]
    test_images: np.ndarray
    test_labels: np.ndarray


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[1797, 8, 8, 1]`` with values 0 to 16, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("The digits come with scikit-learn: pip install 'jdml[experiments]'")
    images, labels = load_digits(return_X_y=True)
    return images.astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.int32)


def divide(
    images: np.ndarray,
    labels: np.ndarray,
    alpha: float,
    seed: int,
    mesh: Mesh,
    *,
    batch: int,
    test_images: int,
) -> Digits:
    """Test images aside, the rest over the workers of ``mesh`` by label.

    Args:
      images: From :func:`read_digits`.
      labels: Likewise.
      alpha: Of ``label_skew``: small gives a digit to few workers.
      seed: Of the test images, the division and the order.
      mesh: Its axis ``data`` holds the workers.
      batch: Images of one worker's step.
      test_images: Images that no worker trains on.
    """
    order = permutation(len(images), seed, 0)
    test, rest = np.split(order, [test_images])
    parts = label_skew(labels[rest], mesh.shape["data"], alpha, seed, min_samples=batch)
    samplers = [Sampler(len(p), batch, seed) for p in parts]
    placed = NamedSharding(mesh, P("data"))

    def batches() -> Iterator[dict[str, jax.Array]]:
        while True:
            rows = np.concatenate(
                [rest[part[next(s)]] for part, s in zip(parts, samplers, strict=True)]
            )
            one_hot = np.eye(CLASSES, dtype=np.float32)[labels[rows]]
            yield jax.device_put({"inputs": images[rows], "targets": one_hot}, placed)

    return Digits(batches(), images[test], labels[test])
