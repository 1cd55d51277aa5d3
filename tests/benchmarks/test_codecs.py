import pytest

from benchmarks import codecs


@pytest.mark.parametrize(
    "name",
    [
        "int8",
        "one_bit",
        pytest.param("terngrad", marks=pytest.mark.slow),
        pytest.param("top_k 1 %, int8", marks=pytest.mark.slow),
    ],
)
def test_measures_speed_bits_and_error(monkeypatch, name):
    monkeypatch.setattr(codecs, "NUM_ELEMENTS", 1 << 15)
    monkeypatch.setattr(codecs, "cpu_seconds", lambda run: float(run() is not None))
    figures = codecs.measure(codecs.CODECS[name])
    assert 0 < figures.bits <= 9
    assert 0 < figures.error < 2
    assert (figures.encode, figures.decode) == (1.0, 1.0)


def test_takes_the_least_of_at_least_ten_tries():
    tries = []
    assert codecs.cpu_seconds(lambda: tries.append(None), seconds=0) >= 0
    assert len(tries) == 11  # one warms up


def test_names_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(codecs, "keep_to_one_core", lambda: None)
    monkeypatch.setattr("sys.argv", ["codecs", "int9"])
    with pytest.raises(SystemExit, match="int9: not among identity"):
        codecs.main()
