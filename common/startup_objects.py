"""What a service builds at its start and keeps: nothing that the garbage collector needs to visit."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Leave the garbage collector off in this block, which imports large libraries.

    Their objects stay, and each collection visits all that exist so far. Start no process in the block: one that is
    forked would never collect.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def freeze_startup_objects() -> None:
    """Exempt all present objects from the garbage collector. Call it once in a process, when its service is built.

    The libraries leave hundreds of thousands of objects, and a full collection visits every one. Objects that are made
    later are collected as before.
    """
    gc.collect()
    gc.freeze()
