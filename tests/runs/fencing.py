"""Checks of a run's folder after learners have replaced each other."""

import json
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from blake3 import blake3

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import CONTROL, DEAD_LETTERS, RunFinished, VersionPublished, decode
from palimpsest.services.learner.checkpointing.manifest import complete
from tests.runs.run_process import check_ledger, history

Things = set[tuple[str, int, int]]
"""Objects in the store: kind (`version` or `checkpoint`), version, writer."""


def stored(home: Path, writer: int | None = None) -> Things:
    """Versions and committed checkpoints of one writer, or of all."""
    manifests = [json.loads(path.read_bytes())["manifest"] for path in home.glob("snapshots/versions/*.json")]
    commits = [path.stem.split("-") for path in home.glob("snapshots/checkpoints/*.json")]
    things = {("version", manifest["version"], manifest["writer"]) for manifest in manifests} | {
        ("checkpoint", int(version), int(writer)) for version, writer in commits
    }
    return {thing for thing in things if writer in (None, thing[2])}


def check_whole(home: Path, before: Mapping[int, Things], *, samples: int = 4, max_staleness: int = 3) -> None:
    """Assert that the folder is that of a single learner. `before`: writer -> its objects when it was replaced."""
    for writer, things in before.items():
        assert stored(home, writer) == things, f"writer {writer} stored something after it was replaced"
    check_ledger(home, samples=samples, max_staleness=max_staleness)
    lines = history(home)
    trained = [line["trajectories"]["trained"] for line in lines]
    assert trained == list(accumulate(line["batch"] for line in lines))
    commits = {path.stem: json.loads(path.read_bytes())["digest"] for path in home.glob("snapshots/checkpoints/*.json")}
    manifests = {path.name: (path / "manifest.json").read_bytes() for path in complete(home / "checkpoints")}
    assert commits == {name: blake3(manifest).hexdigest() for name, manifest in manifests.items()}
    writers = [writer for _, _, writer in sorted(stored(home), key=lambda thing: thing[1:])]
    assert writers == sorted(writers), "a replaced learner stored a later version than its successor's first"
    bus = SqliteBus(home / "bus.sqlite")
    control = [decode(CONTROL, record.body) for record in everything(bus, CONTROL)]
    messages = [message for message in control if isinstance(message, VersionPublished | RunFinished)]
    announced = [message.version for message in messages if isinstance(message, VersionPublished)]
    assert announced == sorted(announced), "an older version was announced after a newer one"
    # a learner that dies after RunFinished is restarted, and its successor publishes RunFinished again
    ending = [
        message.version for message in messages[next(i for i, m in enumerate(messages) if isinstance(m, RunFinished)) :]
    ]
    assert set(ending) == {announced[-1]}, "the run continued after RunFinished"
    assert isinstance(messages[-1], RunFinished)
    assert list(everything(bus, DEAD_LETTERS)) == []
    bus.close()


def everything(bus: SqliteBus, topic: str) -> Iterator[Any]:
    """Every record of the topic."""
    with bus.consumer(topic) as consumer:
        while found := consumer.poll(limit=1000, timeout_s=0):
            yield from found
