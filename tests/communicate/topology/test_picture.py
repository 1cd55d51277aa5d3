"""Pictures of graphs: what stands in them, and a clear word where they cannot be drawn."""

import builtins

import pytest

from jdml.communicate.topology import (
    complete,
    draw,
    exponential,
    from_edges,
    one_peer_exponential,
    ring,
    star,
    torus,
)


def texts(panel):
    return [t.get_text() for t in panel.texts if t.get_text()]


def arrows(panel):
    return [t.arrow_patch for t in panel.texts if getattr(t, "arrow_patch", None) is not None]


@pytest.mark.parametrize(
    ("graph", "num_lines"),
    [
        (ring(8), 8),
        (torus(3, 4), 24),
        (complete(5), 10),
        (star(6), 5),
        (exponential(8), 8 + 8 + 4),  # 4 places on is 4 places back: one line for both
        (ring(1), 0),
    ],
)
def test_workers_lines_and_title(tmp_path, graph, num_lines):
    file = tmp_path / "graph.png"
    figure = draw(graph, file)
    (panel,) = figure.axes
    assert len(arrows(panel)) == num_lines
    assert set(map(str, range(graph.num_workers))) <= set(texts(panel))
    assert figure.get_suptitle() == f"{graph.name}: spectral gap {graph.spectral_gap:.3g}"
    assert file.read_bytes().startswith(b"\x89PNG")


def test_weights_are_said_once_if_equal_and_at_their_lines_if_not():
    (panel,) = draw(ring(6)).axes
    assert "edges 0.333, own 0.333" in texts(panel)
    uneven = from_edges(3, [(0, 1), (1, 2)], [0.5, 0.25])
    (panel,) = draw(uneven).axes
    assert sorted(texts(panel)) == sorted(["0", "1", "2", "0.5", "0.25", "0.5", "0.25", "0.75"])
    thick, thin = (patch.get_linewidth() for patch in arrows(panel))
    assert thick > thin


def test_one_panel_per_round():
    figure = draw(one_peer_exponential(8))
    assert [panel.get_title() for panel in figure.axes] == ["round 0", "round 1", "round 2"]
    assert [len(arrows(panel)) for panel in figure.axes] == [8, 8, 4]
    assert "over 3 rounds" in figure.get_suptitle()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"install jdml\[plots\]"):
        draw(ring(3))
