"""Random orders that nobody has to build or store: keyed bijections of [0, n)."""

from math import isqrt

import numpy as np

from megagate.data.hashing import IntArray, WordArray, mix64, mix64_of, stable_key

PERMUTATION_VERSION = 1  # part of the loader's fingerprint: raise it when any order or border changes
MATERIALISED_LIMIT = 65_536  # below, a Feistel network is measurably not uniform, and a table costs nothing
_ROUNDS = 8
_FEW = 6  # up to so many lookups are faster one by one than by numpy, whose calls cost the same for any number
_LARGEST = 1 << 62


class KeyedPermutation:
    """A pseudo-random order of n things: position -> thing, for any position at once.

    Up to `MATERIALISED_LIMIT` things: the order of their 64-bit hashes, as a table (a bijective hash has no ties, so this is a fair
    shuffle; numpy's own shuffles may change with its version, which would change the order of a resumed run). Above: `Feistel`.

    Shapes: positions of any shape -> things of the same shape, int64.

    Raises:
        ValueError: n is not in [1, 2**62].
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= _LARGEST:
            raise ValueError(f"a permutation of {n} things: n must be in [1, {_LARGEST}]")
        self.n = n
        self._table: IntArray | None = None
        if n <= MATERIALISED_LIMIT:
            words = np.arange(n, dtype=np.uint64) + np.uint64(stable_key("table", key))
            self._table = np.argsort(mix64(mix64(words)), kind="stable").astype(np.int64)
            return
        self._network = Feistel(n, key)

    def lookup(self, positions: IntArray) -> IntArray:
        """The things at these positions.

        Raises:
            IndexError: A position is outside [0, n).
        """
        positions = np.asarray(positions, dtype=np.int64)
        few = positions.reshape(-1).tolist() if positions.size <= _FEW else [int(positions.min()), int(positions.max())]
        if few and (min(few) < 0 or max(few) >= self.n):
            raise IndexError(f"positions {min(few)} to {max(few)} of a permutation of {self.n} things")
        if self._table is not None:
            return self._table[positions]
        if positions.size <= _FEW:
            return np.array([self._network.lookup_one(position) for position in few], dtype=np.int64).reshape(positions.shape)
        return self._network.lookup(positions.astype(np.uint64).reshape(-1)).astype(np.int64).reshape(positions.shape)

    def __getitem__(self, position: int) -> int:
        """The thing at one position."""
        return int(self.lookup(np.array([position], dtype=np.int64))[0])

    def __len__(self) -> int:
        return self.n


class Feistel:
    """A Feistel network over a x b >= n with a ~ b ~ sqrt(n): rounds of `left = (left + F(right)) mod a`, then the same for right mod b,
    and cycle walking for the less than a values that exceed n.

    Why it is a bijection: a round adds to one half what depends on the other alone, and is undone by subtracting it; so `encrypt` is a
    bijection of [0, a*b). Repeating it until the value lies below n follows the cycle of a value below n to the next such value, which is a
    bijection of [0, n).

    Args:
        n: Values; at most 2**62, so that no sum or product leaves 64 bits.
        key: Chooses the order.
        rounds: Fewer than eight are measurably not random (tests/data/test_data_permutation.py).

    Source: scheme FE2 of Bellare, Ristenpart, Rogaway, Stegers, Format-Preserving Encryption (2009, IACR eprint 2009/251).
    """

    def __init__(self, n: int, key: int, *, rounds: int = _ROUNDS) -> None:
        rows = isqrt(n - 1) + 1
        self._n = n
        self._rows = rows
        self._columns = -(-n // rows)
        self._round_keys = [stable_key("round", key, index) for index in range(rounds)]

    @property
    def size(self) -> int:
        """a * b."""
        return self._rows * self._columns

    def lookup(self, values: WordArray) -> WordArray:
        """[rows] values below n -> [rows] values below n."""
        values = self.encrypt(values)
        while (outside := np.flatnonzero(values >= np.uint64(self._n))).size:
            values[outside] = self.encrypt(values[outside])
        return values

    def encrypt(self, values: WordArray) -> WordArray:
        """[rows] values below `size` -> [rows] values below `size`."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = np.divmod(values, columns)
        for index, key in enumerate(self._round_keys):
            if index % 2 == 0:
                left = (left + mix64(right ^ np.uint64(key)) % rows) % rows
            else:
                right = (right + mix64(left ^ np.uint64(key)) % columns) % columns
        return left * columns + right

    def lookup_one(self, value: int) -> int:
        """The same as `lookup` of one value, in Python's numbers."""
        while True:
            left, right = divmod(value, self._columns)
            for index, key in enumerate(self._round_keys):
                if index % 2 == 0:
                    left = (left + mix64_of(right ^ key) % self._rows) % self._rows
                else:
                    right = (right + mix64_of(left ^ key) % self._columns) % self._columns
            value = left * self._columns + right
            if value < self._n:
                return value
