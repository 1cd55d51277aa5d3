"""The LIBSVM reader agrees with scikit-learn's and with its own slow way, and names bad lines."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from jdml.partition.sources import libsvm, libsvm_text, read_libsvm, scan_libsvm

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Values of every size, some rows empty, labels of both signs."""
    rows = scipy.sparse.random_array((700, 90), density=0.05, rng=RANDOM).tocsr()
    rows.data *= np.exp(RANDOM.normal(0, 20, rows.nnz)) * RANDOM.choice([-1, 1], rows.nnz)
    path = tmp_path_factory.mktemp("libsvm") / "a.svm"
    dump_svmlight_file(rows, RANDOM.choice([-1, 1], 700), str(path), zero_based=False)
    return path


def same(a, b):
    return a.shape == b.shape and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("data", "indices", "indptr")
    )


@pytest.mark.parametrize("piece", [libsvm.PARSED_AT_ONCE, 1000, 37])
def test_agrees_with_scikit_learn_bit_for_bit(file, piece, monkeypatch):
    monkeypatch.setattr(libsvm, "PARSED_AT_ONCE", piece)
    expected, labels = load_svmlight_file(str(file), zero_based=False)
    read = read_libsvm(file, zero_based=False)
    assert same(read.rows, expected)
    assert np.array_equal(read.labels, labels)


def test_the_quick_way_takes_what_is_regular(file):
    text = file.read_bytes()
    quick, slow = libsvm_text._regular(text), libsvm_text._line_by_line(text)
    assert quick is not None
    for a, b in zip(quick, slow, strict=True):
        assert np.array_equal(a, b)


def test_f32_columns_and_bases(file, tmp_path):
    assert read_libsvm(file, dtype=np.float32).rows.dtype == np.float32
    assert read_libsvm(file, num_features=200).rows.shape == (700, 200)
    (tmp_path / "z").write_text("1 0:2 3:4\n-1 1:5\n")
    for zero_based in (True, "auto"):
        rows, labels = read_libsvm(tmp_path / "z", zero_based=zero_based)
        assert rows.toarray().tolist() == [[2, 0, 0, 4], [0, 5, 0, 0]]
        assert labels.tolist() == [1, -1]
    (tmp_path / "one").write_text("1 1:2 3:4\n")
    assert read_libsvm(tmp_path / "one").rows.toarray().tolist() == [[2, 0, 4]]
    assert read_libsvm(tmp_path / "one", zero_based=True).rows.shape == (1, 4)


LINES = {
    "comments": b"# a file\n1 1:2 # good\n\n  \n+2 2:3\n",
    "queries": b"1 qid:7 1:2\n2 qid:8 2:3\n",
    "windows": b"1 1:2 \r\n2 2:3\r\n",
    "tabs and blanks": b" 1\t1:2  \n\n\n2   2:3",
    "signs": b"+1 1:+2e+0\n+2.e-0 2:.3E+01\n",
    "no newline at the end": b"1 1:2\n2 2:3",
}


@pytest.mark.parametrize("name", LINES)
def test_what_files_look_like(name, tmp_path):
    (tmp_path / "f").write_bytes(LINES[name])
    rows, labels = read_libsvm(tmp_path / "f")
    assert rows.toarray().tolist() == [[2, 0], [0, 3]]
    assert labels.tolist() == [1, 2]
    slow = libsvm_text._line_by_line(LINES[name])
    for a, b in zip(libsvm_text.parse(LINES[name]), slow, strict=True):
        assert np.array_equal(a, b)


def test_labels_alone(tmp_path):
    (tmp_path / "f").write_text("1\n-1\n")
    rows, labels = read_libsvm(tmp_path / "f", num_features=3)
    assert rows.shape == (2, 3)
    assert rows.nnz == 0
    assert labels.tolist() == [1, -1]
    assert scan_libsvm(tmp_path / "f").num_features("f", "auto") == 0


MALFORMED = {
    "1 1:2 3": "expected index:value, got '3'",
    "1 1:2:3": "the value of index 1 is no number: '2:3'",
    "1 1: 2": "the value of index 1 is no number: ''",
    "1 :2": "expected index:value, got ':2'",
    "1:2 2:3": "the label is no number: '1:2'",
    "one 1:2": "the label is no number: 'one'",
    "1,2 1:2": "the label is no number: '1,2'",
    "1 x:2": "expected index:value, got 'x:2'",
    "1 1.5:2": "expected index:value, got '1.5:2'",
    "1 1e1:2": "expected index:value",
    "1 -1:2": "expected index:value, got '-1:2'",
    "1 1:2.3.4": "is no number: '2.3.4'",
    "1 1:2e3e4": "is no number",
    "1 1:2e3.4": "is no number",
    "1 1:.": "is no number: '.'",
    "1 1:-": "is no number: '-'",
    "1 1:+": "is no number",
    "1 1:+-2": "is no number",
    "1 1:2-3": "is no number",
    "1 1:2e": "is no number: '2e'",
    "1 1:1_0": "is no finite number: '1_0'",
    "+": "the label is no number: '\\+'",
    "1 1:nan": "is no finite number: 'nan'",
    "1 1:-inf": "is no finite number",
    "1 1:1e999": "is no finite number: '1e999'",
    "nan 1:1": "the label is no finite number",
    "1 3:1 2:1": "index 2 follows 3",
    "1 3:1 3:1": "index 3 follows 3",
    "1 1:1 qid:3": "expected index:value, got 'qid:3'",
    "1 qid:x 1:1": "expected index:value, got 'qid:x'",
    "1 99999999999999999999:1": "expected index:value",
    "1 1:\xff": "is no number",
}


@pytest.mark.parametrize("line", MALFORMED)
@pytest.mark.parametrize("piece", [libsvm.PARSED_AT_ONCE, 30])
def test_a_malformed_line_is_named(line, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(libsvm, "PARSED_AT_ONCE", piece)
    (tmp_path / "bad.svm").write_bytes(b"1 1:2 2:3\n\n" * 20 + line.encode("latin1") + b"\n1 1:2\n")
    for read in (read_libsvm, scan_libsvm):
        with pytest.raises(ValueError, match=rf"bad.svm, line 41: .*{MALFORMED[line]}"):
            read(tmp_path / "bad.svm")


def outcome(reader, text):
    """What it reads, or what it says of which line."""
    try:
        return [np.asarray(x).tolist() for x in reader(text)]
    except libsvm_text.MalformedLine as error:
        return error.line, error.reason


def test_any_byte_changed_is_read_as_the_slow_way_reads_it():
    """Neither quietly something else, nor refused where the slow way takes it."""
    text = b"+1 1:2.5 12:-3e-2\n-1 3:4\n\n7.5 2:1 3:.5 40:1e3 # x\n"
    taken = 0
    for _ in range(1500):
        changed = bytearray(text)
        for _ in range(RANDOM.integers(1, 3)):
            changed[RANDOM.integers(len(text))] = RANDOM.choice(list(b"0123456789+-.eE: \n#x_"))
        got = outcome(libsvm_text.parse, bytes(changed))
        expected = outcome(libsvm_text._line_by_line, bytes(changed))
        assert got == expected, bytes(changed)
        taken += isinstance(expected[0], list)
    assert 200 < taken < 1400


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_compressed_files(file, suffix, tmp_path):
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    with opener(tmp_path / f"a{suffix}", "wb") as out:
        out.write(file.read_bytes())
    assert same(read_libsvm(tmp_path / f"a{suffix}").rows, read_libsvm(file).rows)


def test_pieces_are_the_rows(file, monkeypatch):
    monkeypatch.setattr(libsvm, "PARSED_AT_ONCE", 2000)
    whole = read_libsvm(file, zero_based=False)
    found = scan_libsvm(file)
    assert (found.num_rows, found.num_nonzeros) == (700, whole.rows.nnz)
    assert found.max_row_nonzeros == np.diff(whole.rows.indptr).max()
    assert found.num_features(file, False) == whole.rows.shape[1]
    pieces = [
        libsvm.read_piece(file, start, end, line, num_features=90, zero_based=False)
        for start, end, line in zip(found.offsets[:-1], found.offsets[1:], found.lines, strict=True)
    ]
    assert len(pieces) > 5
    assert [len(p.labels) for p in pieces] == np.diff(found.row_offsets).tolist()
    joined = scipy.sparse.vstack([p.rows for p in pieces]).tocsr()
    assert (joined[:, : whole.rows.shape[1]] != whole.rows).nnz == 0
    assert np.array_equal(np.concatenate([p.labels for p in pieces]), whole.labels)


def test_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such LIBSVM file"):
        read_libsvm(tmp_path / "none")
    for content in ("", "\n# nothing\n\n"):
        (tmp_path / "empty").write_text(content)
        for read in (read_libsvm, scan_libsvm):
            with pytest.raises(ValueError, match="empty holds no rows"):
                read(tmp_path / "empty")
    with pytest.raises(ValueError, match="and num_features=3"):
        read_libsvm(file, num_features=3)
    with pytest.raises(ValueError, match="got dtype int32"):
        read_libsvm(file, dtype=np.int32)
    (tmp_path / "z").write_text("1 0:2\n")
    with pytest.raises(ValueError, match="index 0 occurs, and zero_based=False"):
        read_libsvm(tmp_path / "z", zero_based=False)
