"""The order of a dataset's rows: a function of the task seed alone, so nothing of it is in a checkpoint. Pure.

Task seed n is position n mod rows of epoch n // rows. Each epoch is a permutation of the rows of its own, which the
shuffle seed selects. The permutation is a Feistel network with cycle walking (Black and Rogaway, Ciphers with arbitrary
finite domains, 2002), so one row costs the same for any number of rows.
"""

from hashlib import blake2b

ROUNDS = 6


def row_of(seed: int, rows: int, shuffle: int | None) -> int:
    """Return the row of this task seed, in [0, rows). shuffle: None keeps the order of the file.

    >>> [row_of(seed, 3, None) for seed in range(5)]
    [0, 1, 2, 0, 1]
    >>> sorted(row_of(seed, 100, 7) for seed in range(300, 400)) == list(range(100))
    True
    """
    epoch, position = divmod(seed, rows)
    return position if shuffle is None else permuted(position, rows, f"{shuffle}/{epoch}")


def permuted(position: int, size: int, key: str) -> int:
    """Return where the permutation `key` of range(size) moves `position`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        position = _feistel(position, half, key)
        if position < size:
            return position


def _feistel(value: int, half: int, key: str) -> int:
    """Permute range(4**half)."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        mixed = int.from_bytes(blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest())
        left, right = right, left ^ (mixed & mask)
    return left << half | right
