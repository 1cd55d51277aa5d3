"""The picture's numbers: each visible pair of chunks once, and who waits for whom."""

import numpy as np
import pytest

from jdml.models.attention.picture import draw_rounds, rounds


@pytest.mark.parametrize("axis_size", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_rounds(axis_size, order):
    when, work = rounds(axis_size, order)
    chunks = 2 * axis_size
    assert ((when >= 0) == np.tri(chunks, dtype=bool)).all()
    assert work.sum() == chunks * chunks / 2
    if order == "zigzag":
        assert (work == 2).all()
    else:
        assert work.max(axis=0).sum() == 4 * axis_size - 2


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    figure = draw_rounds(2, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").stat().st_size > 5000
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert len(numbers) == 4 * 5 // 2
    assert set(numbers) == {"0", "1"}
