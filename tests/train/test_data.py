"""Corpora, token files and batches: what is read, in which order, and what is refused."""

import json
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdml.partition.sources import tokens as tokens_module
from jdml.sharding import make_mesh
from jdml.train.data import Batches, Corpus, read_corpus, read_text, read_tokens, standard_library


def corpus_of(num_tokens: int, vocab_size: int = 1000) -> Corpus:
    return Corpus(np.arange(num_tokens, dtype=np.uint16), vocab_size, "counting")


# Text


def test_a_file_is_its_bytes(tmp_path):
    file = tmp_path / "story.anything"
    file.write_bytes("Käse\n".encode())
    assert bytes(read_text(file)) == b"K\xc3\xa4se\n"
    assert bytes(read_text(file, max_bytes=2)) == b"K\xc3"


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(tmp_path):
    for name, text in {
        "b.txt": "B",
        "a/z.md": "AZ\n",
        "a/b/c.txt": "ABC",
        "a.txt": "A",
        "empty.txt": "",
        "skip.bin": "no",
        ".git/x.txt": "no",
        "a/.hidden.txt": "no",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert bytes(read_text(tmp_path)) == b"ABC\nAZ\nA\nB\n"
    assert bytes(read_text(tmp_path, suffixes=["md"])) == b"AZ\n"
    assert bytes(read_text(tmp_path, max_bytes=6)) == b"ABC\nAZ"


def test_the_default_corpus_is_the_library_of_this_python():
    data = standard_library()
    assert np.array_equal(data, standard_library())
    assert 5e6 < data.size <= 16 << 20
    text = bytes(data)
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "argparse.py").read_bytes() in text
    # Neither tests nor what the build of this interpreter wrote.
    assert (library / "unittest/__init__.py").read_bytes() in text
    assert b"build_time_vars = {" not in text
    for test in (library / "test").glob("test_a*.py"):
        assert test.read_bytes() not in text


def test_the_default_corpus_is_bounded():
    assert np.array_equal(standard_library(1000), standard_library()[:1000])
    assert read_corpus(max_bytes=1000).tokens.size == 1000


def test_the_default_corpus_of_an_interpreter_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no \.py files; give a text file or folder"):
        standard_library()


def test_missing_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text file") as caught:
        read_corpus(tmp_path / "gone.txt")
    assert caught.value.filename == str(tmp_path / "gone.txt")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_corpus(tmp_path / "empty.txt")


def test_a_folder_without_text_says_what_is_there(tmp_path):
    for name in ("a.jpg", "b.jpg", "README"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"\.txt .*found none .*2 \.jpg, 1 \(no suffix\)"):
        read_corpus(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(PermissionError, match="cannot read this text file") as caught:
        read_corpus(tmp_path)
    assert caught.value.filename.endswith("secret.txt")


# Token files


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint32", "int64"])
def test_token_files_are_mapped_with_their_dtype(tmp_path, dtype):
    ids = np.arange(100, dtype=dtype)
    ids.tofile(tmp_path / "t.bin")
    np.save(tmp_path / "t.npy", ids)
    for tokens in (read_tokens(tmp_path / "t.bin", dtype), read_tokens(tmp_path / "t.npy")):
        assert tokens.dtype == dtype
        assert np.array_equal(tokens, ids)
        assert not tokens.flags.owndata
        assert not tokens.flags.writeable
    assert read_corpus(tmp_path / "t.npy", vocab_size=100).vocab_size == 100


def test_both_kinds_of_file_give_the_same_corpus(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    ids.tofile(tmp_path / "t.bin")
    np.save(tmp_path / "t.npy", ids.astype(np.int64))
    a = read_corpus(tmp_path / "t.bin", vocab_size=100, dtype="uint16")
    b = read_corpus(tmp_path / "t.npy", vocab_size=100)
    assert a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda f: f.with_suffix(".bin").write_bytes(b"x" * 7), ("uint16",), "has 7 bytes.*uint16"),
        (lambda f: f.with_suffix(".bin").write_bytes(b"x" * 8), (), "does not say what it holds"),
        (lambda f: f.with_suffix(".bin").write_bytes(b"x" * 8), ("float32",), "float32"),
        (lambda f: f.with_suffix(".bin").touch(), ("uint16",), r"t\.bin is empty"),
        (lambda f: np.save(f, np.zeros(3)), (), "integers, got dtype float64"),
        (lambda f: np.save(f, np.zeros(3, bool)), (), "integers, got dtype bool"),
        (lambda f: np.save(f, np.zeros((3, 2), int)), (), r"one dim .* \(3, 2\)"),
        (lambda f: np.save(f, np.zeros(3, np.int32)), ("uint16",), "holds int32, but dtype uint16"),
        (lambda f: np.save(f, np.zeros(0, np.int32)), (), r"t\.npy is empty"),
        (lambda f: np.save(f, np.array(["a"], object)), (), "cannot be read as a .npy array"),
        (lambda f: f.write_bytes(b"no header"), (), "cannot be read as a .npy array"),
        (lambda f: f.touch(), (), r"t\.npy cannot be read as a .npy array"),
    ],
)
def test_bad_token_files_are_refused(tmp_path, make, arguments, message):
    make(tmp_path / "t.npy")
    (file,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=message) as caught:
        read_tokens(file, *arguments)
    assert str(file) in str(caught.value)


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such token file") as caught:
        read_corpus(tmp_path / "gone.bin", vocab_size=10, dtype="uint16")
    assert caught.value.filename == str(tmp_path / "gone.bin")


def test_what_is_missing_or_too_much_is_said(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(9))
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(ValueError, match="give vocab_size"):
        read_corpus(tmp_path / "t.npy")
    with pytest.raises(ValueError, match=r"it is for \.bin files"):
        read_corpus(tmp_path / "t.txt", dtype="uint16")
    with pytest.raises(ValueError, match="no token file"):
        read_tokens(tmp_path / "t.txt", "uint16")


@pytest.mark.parametrize(
    ("bad", "message"), [(256, "token id 256 .position 70"), (-1, "token id -1 .position 70")]
)
def test_ids_beyond_the_vocabulary_are_refused(bad, message):
    ids = np.zeros(100, np.int32)
    ids[70] = bad
    with pytest.raises(ValueError, match=message):
        Corpus(ids, 256, "ids")


def test_a_long_corpus_is_sampled_and_batches_find_the_rest(monkeypatch):
    monkeypatch.setattr(tokens_module, "MAX_SAMPLED", 2 * 64)
    monkeypatch.setattr(tokens_module, "_BLOCK", 64)
    ids = np.zeros(64 * 10, np.uint16)
    ids[64 * 5] = 999  # in a block that is not looked at
    corpus = Corpus(ids, 256, "ids")
    with pytest.raises(ValueError, match=r"batch \d of ids holds the token id 999"):
        list(Batches(corpus, 3, 8).one_epoch())
    ids[-1] = 999  # the ends are looked at always
    with pytest.raises(ValueError, match="position 639"):
        Corpus(ids, 256, "ids")


# Corpora


def test_the_split_is_contiguous():
    train, valid = corpus_of(1000).split(0.1)
    assert train.tokens.tolist() == list(range(900))
    assert valid.tokens.tolist() == list(range(900, 1000))
    assert train.vocab_size == valid.vocab_size == 1000


@pytest.mark.parametrize("holdout", [0.0, 1.0, 0.0001, -0.5])
def test_a_split_with_an_empty_part_is_refused(holdout):
    with pytest.raises(ValueError, match="leaves nothing to train on or nothing to validate on"):
        corpus_of(100).split(holdout)


def test_the_fingerprint_sees_content_order_and_length():
    corpus = corpus_of(100)
    swapped = corpus.tokens.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [swapped, corpus.tokens[:-1], corpus.tokens + 1]
    prints = {Corpus(t, 1000, "x").fingerprint() for t in others} | {corpus.fingerprint()}
    assert len(prints) == 4
    assert corpus_of(100).fingerprint() == corpus.fingerprint()


# Batches


def test_each_token_is_a_target_once_per_epoch_and_targets_are_one_ahead():
    corpus = corpus_of(16 * 6 + 1)
    targets = []
    for batch in Batches(corpus, 3, 8, seed=5).one_epoch():
        assert batch["inputs"].shape == batch["targets"].shape == (3, 8)
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert np.array_equal(batch["inputs"] + 1, batch["targets"])
        targets.append(batch["targets"])
    assert sorted(np.concatenate(targets).ravel().tolist()) == list(range(1, 97))


def test_resumed_batches_go_on_exactly():
    corpus = corpus_of(500)
    whole = Batches(corpus, 4, 16, seed=2)
    expected = [next(whole)["inputs"] for _ in range(20)]
    first = Batches(corpus, 4, 16, seed=2)
    got = [next(first)["inputs"] for _ in range(9)]
    second = Batches(corpus, 4, 16, seed=2)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.step == 9
    got += [next(second)["inputs"] for _ in range(11)]
    assert np.array_equal(got, expected)


def test_validation_batches_are_the_same_each_time_and_move_nothing():
    batches = Batches(corpus_of(100), 2, 8, shuffle=False)
    first, again = list(batches.one_epoch()), list(batches.one_epoch())
    assert len(first) == batches.batches_per_epoch == 6
    assert all(np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(first, again, strict=True))
    assert len(list(batches.one_epoch(2))) == 2
    assert batches.step == 0
    assert first[0]["inputs"].tolist() == [list(range(8)), list(range(8, 16))]


def test_a_state_of_other_data_is_refused():
    state = Batches(corpus_of(500), 4, 16).state()
    other = Corpus(np.arange(1, 501, dtype=np.uint16), 1000, "other")
    with pytest.raises(ValueError, match=r"corpus: saved .*the same text .other"):
        Batches(other, 4, 16).restore(state)
    with pytest.raises(ValueError, match="seq_len: saved 16, here 8"):
        Batches(corpus_of(500), 4, 8).restore(state)


def test_a_corpus_shorter_than_one_sequence_says_how_long_it_is():
    with pytest.raises(ValueError, match=r"counting has 16 tokens, .* seq_len \+ 1 = 17"):
        Batches(corpus_of(16), 1, 16)
    assert Batches(corpus_of(17), 1, 16).batches_per_epoch == 1


def test_a_corpus_shorter_than_one_batch_says_what_is_needed():
    with pytest.raises(ValueError, match="which is 6 sequences of 16; one batch needs 8, or 129"):
        Batches(corpus_of(100), 8, 16)


@pytest.mark.parametrize(("batch", "seq_len"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_below_one_are_refused(batch, seq_len):
    with pytest.raises(ValueError, match="must be at least 1"):
        Batches(corpus_of(100), batch, seq_len)


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "model"), None])
def test_placed_batches_hold_the_same_rows(spec):
    mesh = make_mesh({"data": 4, "model": 2})
    sharding = None if spec is None else NamedSharding(mesh, spec)
    plain = Batches(corpus_of(500), 8, 16, seed=1)
    placed = Batches(corpus_of(500), 8, 16, seed=1, sharding=sharding)
    for _ in range(3):
        expected, got = next(plain), next(placed)
        for name in ("inputs", "targets"):
            assert np.array_equal(np.asarray(got[name]), expected[name])
            if sharding is not None:
                assert isinstance(got[name], jax.Array)
                assert got[name].sharding == sharding


def test_a_batch_that_the_workers_do_not_divide_is_refused():
    mesh = make_mesh({"data": 4, "model": 2})
    with pytest.raises(ValueError, match=r"\[6, 16\] .rows, seq_len. does not divide"):
        Batches(corpus_of(500), 6, 16, sharding=NamedSharding(mesh, PartitionSpec("data")))


def test_a_placed_batch_does_not_change_when_the_next_is_drawn():
    # A device array may use the host's memory: every batch needs its own.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = Batches(corpus_of(5000, vocab_size=5000), 8, 128, sharding=device)
    first = next(batches)["inputs"]
    copy = np.array(first)
    for _ in range(5):
        next(batches)
    assert np.array_equal(first, copy)
