"""The data set `synthetic`: random tokens with structure to learn, made in memory, for any vocabulary."""

import numpy as np

from megagate.data.hashing import IntArray, canonical_sha256, mix64, stable_key
from megagate.data.manifest import SplitName
from megagate.data.permutation import KeyedPermutation
from megagate.data.split import Windows
from megagate.errors import DataError

_VERSION = 1  # raise it when any token changes
_LARGEST_ALPHABET = 1024  # tokens in use, so that a short run can see each often enough
_SMALLEST_VOCABULARY = 16
_TOKENS = 1 << 40
# Which jump each of 16 equally likely draws takes: successors of probability 8, 4, 2 and 1 in 16; the last draw is noise.
_JUMP_OF_DRAW = np.array([0] * 8 + [1] * 4 + [2] * 2 + [3])


class SyntheticSplit:
    """A Markov chain of order 1 over at most 1,024 tokens of the vocabulary.

    Each state has four successors with probabilities 8/16, 4/16, 2/16 and 1/16; with the remaining 1/16 the next state is any. States
    are numbered so that the successors of x are x + d modulo their number, for four keyed d: a window is then one cumulative sum. A
    keyed permutation turns states into tokens, which hides the arithmetic. All tokens in use are equally frequent, so the unigram
    entropy is the log of their number; the conditional entropy is about 1.7 nats.

    Windows are independent of each other; the tokens of window i are a function of (seed, split, i).

    Args:
        name: `train` or `valid`; the same chain, other windows.
        vocab_size: Ids are below this; at least 16.
        seed: Of the chain and of the windows.

    Raises:
        DataError: The vocabulary is too small.
    """

    def __init__(self, name: SplitName, *, vocab_size: int, seed: int = 0) -> None:
        if vocab_size < _SMALLEST_VOCABULARY:
            raise DataError(f"data.path synthetic needs model.vocab_size of at least {_SMALLEST_VOCABULARY}; it is {vocab_size}; raise it")
        self.name = name
        self.tokens = _TOKENS
        self.vocab_size = vocab_size
        self.fingerprint = canonical_sha256({"name": "synthetic", "version": _VERSION, "vocab_size": vocab_size, "seed": seed})
        states = np.arange(min(vocab_size, _LARGEST_ALPHABET))
        self._token_of_state = KeyedPermutation(vocab_size, stable_key("tokens", seed)).lookup(states)
        self._jumps = KeyedPermutation(states.size, stable_key("jumps", seed)).lookup(states[: int(_JUMP_OF_DRAW.max()) + 1])
        self._key = stable_key("windows", seed, name)

    def ends_with(self, token: int) -> bool:
        """Never: there are no documents."""
        return False

    def windows(self, seq_len: int, *, movable: bool) -> "SyntheticWindows":
        """The windows of a length; their number does not depend on `movable`."""
        return SyntheticWindows(seq_len, token_of_state=self._token_of_state, jumps=self._jumps, key=self._key)


class SyntheticWindows(Windows):
    """Windows made on demand; see `SyntheticSplit`."""

    def __init__(self, seq_len: int, *, token_of_state: IntArray, jumps: IntArray, key: int) -> None:
        self.count = _TOKENS // seq_len
        self._seq_len = seq_len
        self._token_of_state = token_of_state
        self._jump_of_draw = jumps[_JUMP_OF_DRAW]
        self._key = np.uint64(key)

    def read(self, index: IntArray, *, shift: int = 0) -> IntArray:
        """[rows] window numbers -> [rows, seq_len + 1] tokens, int64. There are no borders for `shift` to move."""
        states = np.uint64(self._token_of_state.size)
        seeds = mix64(np.asarray(index, dtype=np.int64).astype(np.uint64) ^ self._key)
        words = mix64(seeds[:, None] + np.arange(self._seq_len + 1, dtype=np.uint64))  # [rows, s + 1]
        draws = (words % np.uint64(16)).astype(np.int64)
        anywhere = (words // np.uint64(16) % states).astype(np.int64)
        steps = np.where(draws < _JUMP_OF_DRAW.size, self._jump_of_draw[np.minimum(draws, _JUMP_OF_DRAW.size - 1)], anywhere)
        steps[:, 0] = anywhere[:, 0]  # the first state is any
        return self._token_of_state[np.cumsum(steps, axis=1) % int(states)]
