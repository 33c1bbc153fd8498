"""Objects of the start are no work for the garbage collector; later ones are collected. In processes of their own."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc, weakref
from palimpsest.common.startup_objects import freeze_startup_objects

class Node: ...

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

gc.disable()
garbage, kept = cycle(), Node()
freeze_startup_objects()
assert garbage() is None, "garbage of the start would stay for ever"
assert not any(found is kept for found in gc.get_objects()), "a collection visits it"
later = cycle()
gc.collect()
assert later() is None, "garbage made later stays"
print("done")
"""


BLOCK = """
import gc, sys
from palimpsest.common.startup_objects import without_collections

def fail():
    with without_collections():
        assert not gc.isenabled()
        raise ImportError

if sys.argv[1] == "off":
    gc.disable()
with without_collections():
    assert not gc.isenabled()
try:
    fail()
except ImportError:
    pass
assert gc.isenabled() == (sys.argv[1] == "on")
print("done")
"""


def run(*command: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, check=False)
    return done.stdout, done.stderr


def test_later_garbage_is_collected_without_a_visit_to_the_objects_of_the_start() -> None:
    assert run(PROGRAM) == ("done\n", "")


@pytest.mark.parametrize("before", ["on", "off"])
def test_imports_without_collections_leave_the_collector_as_it_was(before: str) -> None:
    """Also if the import fails."""
    assert run(BLOCK, before) == ("done\n", "")
