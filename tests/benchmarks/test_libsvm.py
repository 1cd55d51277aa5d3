"""The benchmark of the LIBSVM reader runs, small."""

import sys

from benchmarks import libsvm


def test_a_row_for_each_file(monkeypatch, capsys):
    monkeypatch.setattr(libsvm, "TRIES", 1)
    monkeypatch.setattr(sys, "argv", ["libsvm", "--rows", "40"])
    libsvm.main()
    shown = capsys.readouterr().out
    # 1 % of 40 × 5,000 entries
    assert "0.0 M non-zeros, all digits" in shown
    assert "four digits" in shown
    assert "MB/s" in shown
    assert "scikit-learn" in shown
