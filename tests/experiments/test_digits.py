"""The digits that several experiments share; what is said when they lack."""

import sys
from itertools import islice

import jax
import numpy as np
import pytest

from experiments.digits import divide, read_digits
from jdml.sharding import make_mesh


def test_test_images_are_no_ones_and_workers_keep_to_their_own():
    images, labels = read_digits()
    assert images.shape == (1797, 8, 8, 1)
    assert images.max() == 16
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    digits = divide(images, labels, 0.3, 0, mesh, batch=16, test_images=360)
    assert len(digits.test_images) == 360
    seen = [set() for _ in range(4)]
    counts = np.zeros((4, 10))
    for batch in islice(digits.batches, 60):
        for k, (x, y) in enumerate(
            zip(np.split(batch["inputs"], 4), np.split(batch["targets"], 4), strict=True)
        ):
            seen[k] |= {image.tobytes() for image in np.asarray(x)}
            counts[k] += np.asarray(y).sum(axis=0)
    assert sum(map(len, seen)) > 1000
    everyone = set().union(*seen)
    assert len(everyone) == sum(map(len, seen))  # no image with two workers
    assert everyone.isdisjoint(image.tobytes() for image in digits.test_images)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert shares.max(axis=0).mean() > 2 * shares.mean()  # a digit belongs to some more than others


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'jdml\[experiments\]'"):
        read_digits()
