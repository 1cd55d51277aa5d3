"""What a checkpoint says about itself, and how differences are named."""

import dataclasses
import json
from pathlib import Path

import pytest

from jdml.train.saving.record import (
    FORMAT,
    config_differences,
    leaf_differences,
    listed,
    plain,
    seal,
    unseal,
)


def leaf(shape: list[int], dtype: str = "float32") -> dict:
    return {"shape": shape, "dtype": dtype}


def test_a_sealed_record_reads_back():
    record = {"format": FORMAT, "step": 3, "data": {"x": [1, 2.5, None]}, "digests": {"a": 2**63}}
    assert unseal(json.dumps(seal(record)).encode()) == record


def test_any_flipped_bit_of_a_record_is_seen():
    text = json.dumps(seal({"format": FORMAT, "step": 17, "data": {"seed": 5}})).encode()
    for position in range(len(text)):
        for bit in range(8):
            damaged = bytearray(text)
            damaged[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"record cannot be read|record is damaged"):
                unseal(bytes(damaged))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"record": 1}', b"\xff", b"nul"])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match="record cannot be read"):
        unseal(text)


def test_another_format_is_named():
    with pytest.raises(ValueError, match=r"format is 'jdml\.checkpoint\.9'; this version reads"):
        unseal(json.dumps(seal({"format": "jdml.checkpoint.9"})).encode())


def test_configurations_become_plain_and_compare_as_read_back():
    @dataclasses.dataclass(frozen=True)
    class Model:
        width: int = 8
        dims: tuple[int, ...] = (1, 2)
        path: Path = Path("/x")

    @dataclasses.dataclass(frozen=True)
    class Config:
        model: Model = dataclasses.field(default_factory=Model)
        lr: float = 0.1

    config = plain(Config())
    assert config == {"model": {"width": 8, "dims": [1, 2], "path": "/x"}, "lr": 0.1}
    assert config_differences(json.loads(json.dumps(config)), config) == []
    assert plain(None) is None
    with pytest.raises(ValueError, match="mapping or a dataclass instance, got list"):
        plain([1])


def test_differing_keys_are_named_with_both_values():
    saved = {"model": {"layers": 4, "width": 8}, "codec": "int8", "old": 1, "empty": {}}
    given = {"model": {"layers": 6, "width": 8}, "codec": None, "new": "x", "empty": {}}
    assert config_differences(saved, given) == [
        "codec: saved 'int8', given None",
        "model.layers: saved 4, given 6",
        "new: saved (nothing), given 'x'",
        "old: saved 1, given (nothing)",
    ]
    assert config_differences({"clip": float("nan")}, {"clip": float("nan")}) == []
    assert config_differences(None, {"a": 1}) == ["a: saved (nothing), given 1"]


def test_differing_leaves_are_named_with_shape_and_dtype():
    saved = {"same": leaf([2]), "shape": leaf([2, 3]), "dtype": leaf([]), "gone": leaf([1], "int8")}
    given = {
        "same": leaf([2]),
        "shape": leaf([3, 2]),
        "dtype": leaf([], "key<fry>"),
        "new": leaf([]),
    }
    assert leaf_differences(saved, given) == [
        "leaf 'shape': saved float32[2, 3], given float32[3, 2]",
        "leaf 'dtype': saved float32[], given key<fry>[]",
        "leaf 'new' (float32[]) is not in the checkpoint",
        "leaf 'gone' (int8[1]) is only in the checkpoint",
    ]


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "\n  a\n  b"
    assert listed([str(i) for i in range(20)]).endswith("\n  7\n  … and 12 more")
