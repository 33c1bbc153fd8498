"""Objects of the start are no work for the garbage collector; later ones are collected. In a process of its own."""

import subprocess
import sys

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


def test_later_garbage_is_collected_without_a_visit_to_the_objects_of_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")
