"""Plain data (containers, numbers, arrays) as JSON and one vector of bytes.

For states whose structure is not known before they are read. Arrays keep their bits, dtype and
identity: one that is there twice is written once, and is one array again when it is read.
"""

import math
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64


def pack(value: Any) -> tuple[Any, np.ndarray]:
    """``(JSON, uint8 [num_bytes])``.

    Args:
      value: ``None``, bools, numbers, strings, NumPy and JAX arrays (typed keys too), in dicts
        with ints or strings as keys, lists, tuples and sets.

    Raises:
      ValueError: something else is in it.
    """
    packer = _Packer()
    outline = packer.outline(value)
    if not packer.size:
        return outline, np.zeros(0, np.uint8)
    out = np.zeros(packer.size, np.uint8)
    for offset, x in packer.arrays:
        out[offset : offset + x.nbytes] = x.reshape(-1).view(np.uint8)
    return outline, out


def unpack(outline: Any, data: np.ndarray) -> Any:
    """What :func:`pack` was given; arrays are read-only NumPy arrays, typed keys are keys."""
    return _Unpacker(data).value(outline)


class _Packer:
    def __init__(self) -> None:
        self.arrays: list[tuple[int, np.ndarray]] = []
        self.size = 0
        self._known: dict[int, tuple[Any, list[Any]]] = {}

    def outline(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else ["float", value.hex()]
        if isinstance(value, dict):
            for key in value:
                if type(key) not in (int, str):
                    raise ValueError(f"cannot save a dict with the key {key!r}: an int or str.")
            return ["dict", *([key, self.outline(x)] for key, x in value.items())]
        if isinstance(value, list):
            return ["list", *map(self.outline, value)]
        if isinstance(value, tuple):
            return ["tuple", *map(self.outline, value)]
        if isinstance(value, set):
            return ["set", *map(self.outline, sorted(value))]
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return self._array(value)
        raise ValueError(
            f"cannot save a {type(value).__name__}: expected numbers, strings, arrays, and dicts, "
            "lists, tuples and sets of them."
        )

    def _array(self, value: Any) -> list[Any]:
        if id(value) in self._known:
            return self._known[id(value)][1]
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = self._array(jax.random.key_data(value))
            outline: list[Any] = ["key", str(jax.random.key_impl(value)), data]
        else:
            x = np.ascontiguousarray(value)
            if x.dtype.hasobject:
                raise ValueError(f"cannot save an array of {x.dtype}.")
            x = x.astype(x.dtype.newbyteorder("="), copy=False)
            outline = ["array", x.dtype.name, list(np.shape(value)), self.size]
            self.arrays.append((self.size, x))
            self.size += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        # Kept with the array, whose id another one could have after it.
        self._known[id(value)] = (value, outline)
        return outline


class _Unpacker:
    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        self._known: dict[int, np.ndarray] = {}

    def value(self, outline: Any) -> Any:
        if not isinstance(outline, list):
            return outline
        kind, *rest = outline
        if kind == "float":
            return float.fromhex(rest[0])
        if kind == "dict":
            return {key: self.value(x) for key, x in rest}
        if kind == "list":
            return [self.value(x) for x in rest]
        if kind == "tuple":
            return tuple(self.value(x) for x in rest)
        if kind == "set":
            return {self.value(x) for x in rest}
        if kind == "key":
            return jax.random.wrap_key_data(self.value(rest[1]), impl=rest[0])
        assert kind == "array", kind
        return self._array(*rest)

    def _array(self, name: str, shape: list[int], offset: int) -> np.ndarray:
        dtype = np.dtype(name)
        num_bytes = math.prod(shape) * dtype.itemsize
        known = self._known.get(offset) if num_bytes else None
        if known is None:
            x = np.array(self._data[offset : offset + num_bytes])  # the vector may go
            known = x.view(dtype).reshape(shape)
            known.flags.writeable = False
            if num_bytes:
                self._known[offset] = known
        return known
