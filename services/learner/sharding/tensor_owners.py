"""Which rank stores which tensors of a version. Pure.

A tensor is stored by one rank: its digest covers all its bytes, and whole tensors keep the slices of the encoding.
"""

from collections.abc import Iterable, Mapping


def tensor_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Return the rank that stores each tensor: the largest first, each by the rank with the fewest bytes so far.

    No rank has more than an equal share and one tensor. sizes: name -> bytes. The result depends on nothing else, so
    every rank finds the same, for every version.

    >>> tensor_owners({"a": 1, "b": 4, "c": 3, "d": 2}, 2)
    {'b': 0, 'c': 1, 'd': 1, 'a': 0}
    """
    owners, held = {}, [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = min(range(ranks), key=lambda rank: (held[rank], rank))
        held[owners[name]] += sizes[name]
    return owners


def largest_share(sizes: Iterable[int], ranks: int) -> int:
    """Return the bytes of the rank that stores most.

    >>> largest_share([1, 4, 3, 2], 2), largest_share([10, 1, 1], 2)
    (5, 10)
    """
    by_name = {f"{number}": size for number, size in enumerate(sizes)}
    held = [0] * ranks
    for name, rank in tensor_owners(by_name, ranks).items():
        held[rank] += by_name[name]
    return max(held)
