"""Publishes the versions of the loop, and writes the checkpoints between them: inline, or in threads.

Inline, the loop waits for both. In the background, a thread stores and announces the version while the loop takes the
next batch and makes its passes. At most one version is not announced: the loop waits for the announcement before the
first optimizer step. Until then nothing that others read may name the version (docs/decisions/0027).

With a checkpoint for every version, the same thread commits the checkpoint first, so that no batch of an announced
version is trained again. The weights and moments stay as they are until the step, so it needs no copy of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from palimpsest.common import failpoints
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints
from palimpsest.services.learner.checkpointing.manifest import Progress
from palimpsest.services.learner.publishing.background import Background
from palimpsest.services.learner.publishing.publisher import Prepared, Publisher
from palimpsest.services.learner.timing import PhaseTimer

LAST_WAIT_S = 30.0
"""Limit of the wait for a thread when the learner ends by an error, seconds."""

Naming = Literal["changes", "offers", "scores"]
"""Messages that name the newest version. A successor rejects them if the store does not hold it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of the learner for a checkpoint."""

    progress: Progress
    tensors: dict[str, torch.Tensor]


class Publishing:
    """The versions and checkpoints of one loop. The loop's thread calls every method.

    background: write in a thread. phases: of the loop; `publish_wait` is the wait for a thread. announced: called with
    each announced version and its digest. needed: returns the lowest version that the store must keep for a run that
    continues from this version; a thread may call it.
    """

    def __init__(
        self,
        publisher: Publisher,
        checkpoints: Checkpoints,
        phases: PhaseTimer,
        *,
        background: bool,
        announced: Callable[[Version, str], None],
        needed: Callable[[Version], Version],
    ) -> None:
        self._publisher, self._checkpoints, self._phases = publisher, checkpoints, phases
        self._in_background, self._announced, self._needed = background, announced, needed
        self._versions: Background[Manifest] = Background("publishing")
        self.digest = ""
        """Of the version announced last."""

    @property
    def pending(self) -> bool:
        """Whether a version is not announced, or `look` has not seen that it is."""
        return self._versions.busy

    def start(self, version: Version, *, now: float) -> Version:
        """Publish the version that a learner starts with; see Publisher.republish. Return its number."""
        manifest = self._publisher.republish(version, now=now)
        self.digest = manifest.digest
        return manifest.version

    def publish(self, version: Version, checkpoint: Checkpoint | None, *, now: float) -> None:
        """Write the checkpoint, if there is one, and publish the model's weights as this version.

        now: Unix time in seconds. Inline, raises what Checkpoints.save and Publisher.publish raise; else `look` does.
        """
        if self._in_background:
            with self._phases.of("publish"):
                prepared = self._publisher.prepare()
            self._versions.begin(partial(self._write, version, prepared, checkpoint, now))
            return
        if checkpoint is not None:
            with self._phases.of("checkpoint"):
                self.save(checkpoint)
        with self._phases.of("publish"):
            self._note(self._write(version, self._publisher.prepare(), None, now))

    def save(self, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint now. Return whether it was written; see Checkpoints.save."""
        return self._checkpoints.save(checkpoint.progress, checkpoint.tensors)

    def look(self) -> bool:
        """Return whether all versions are announced. Raises what failed in the thread, Fenced included."""
        if self._versions.done:
            self._note(self._versions.collect())
        return not self.pending

    def permits(self, _what: Naming) -> bool:
        """Return whether such messages may name the newest version. Raises as `look` does."""
        return self.look()

    def finish(self) -> None:
        """Wait until all versions are announced. Raises what failed in the thread, Fenced included."""
        if self.wait():
            self.look()
        elif self.pending:
            self._versions.collect()

    def wait(self) -> bool:
        """Wait until all versions are announced. Return False if that failed; then `look` raises the error.

        For a collective operation, in which this rank must not fail alone.
        """
        if not self.pending:
            return True
        with self._phases.of("publish_wait"):
            succeeded = self._versions.wait()
        return succeeded and self.look()

    def close(self) -> None:
        """Wait a little for the thread: the learner ends. Its error is lost."""
        self._versions.wait(LAST_WAIT_S)

    def _write(self, version: Version, prepared: Prepared, checkpoint: Checkpoint | None, now: float) -> Manifest:
        if checkpoint is not None:
            self.save(checkpoint)
        failpoints.reach("learner.before_publishing")
        manifest = self._publisher.publish(version, now=now, prepared=prepared)
        kept = self._checkpoints.oldest_version()
        self._publisher.keep_from(self._needed(min(version, kept if kept is not None else Version(0))))
        return manifest

    def _note(self, manifest: Manifest) -> None:
        """The version is announced."""
        self.digest = manifest.digest
        self._announced(manifest.version, manifest.digest)
