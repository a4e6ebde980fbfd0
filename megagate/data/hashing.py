"""Hashes that give the same value on every machine and every version of Python and numpy: order and content of data rest on them."""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def stable_key(*parts: str | int) -> int:
    """A 64-bit key of any parts; parts of other types, order or borders give unrelated keys."""
    # JSON keeps borders and types apart: ("a", "b") is not ("ab",), and 1 is not "1".
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def canonical_sha256(value: Any) -> str:
    """sha256 (hex) of a JSON value that does not depend on the order of keys or on white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def mix64(words: WordArray) -> WordArray:
    """Scrambles each 64-bit word; a bijection, so that distinct words stay distinct.

    Shapes: any -> the same. Needs an array: numpy warns when a *scalar* wraps around.

    Source: the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
    """
    z = words + np.uint64(_GOLDEN)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MULTIPLY_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MULTIPLY_2)
    z ^= z >> np.uint64(31)
    return z


def mix64_of(word: int) -> int:
    """`mix64` of one word, as a Python int in [0, 2**64): of a few words it costs a fraction of numpy's calls."""
    z = (word + _GOLDEN) & _WORD
    z = (z ^ z >> 30) * _MULTIPLY_1 & _WORD
    z = (z ^ z >> 27) * _MULTIPLY_2 & _WORD
    return z ^ z >> 31
