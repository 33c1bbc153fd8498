"""Publishes the versions of the loop, and writes the checkpoints between them: inline, or in threads.

Inline, the loop waits for both. In the background, a thread stores and announces the version while the loop takes the
next batch and makes its passes. At most one version is not announced: the loop waits for the announcement before the
first optimizer step. Until then nothing that others read may name the version (docs/decisions/0027).

With a checkpoint for every version, the same thread commits the checkpoint first, so that no batch of an announced
version is trained again. The weights and moments stay as they are until the step, so it needs no copy of them. Rarer
checkpoints have a thread of their own, which writes a copy of the state: they delay neither steps nor versions, and at
most one is in writing. All ranks write the shards of a checkpoint: then the loop's thread does it, before the version.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from palimpsest.common import failpoints
from palimpsest.common.snapshots.manifest import Canary, Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints
from palimpsest.services.learner.checkpointing.manifest import Progress
from palimpsest.services.learner.publishing.background import Background
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.publishing.stored_bytes import StoredBytes
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

    def copied(self) -> "Checkpoint":
        """Return a copy in host memory, which later steps do not change."""
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return Checkpoint(self.progress, tensors)


class Publishing:
    """The versions and checkpoints of one loop. The loop's thread calls every method.

    background: write in a thread. phases: of the loop; `publish_wait` is the wait for a thread. announced: called with
    each announced version and its digest. needed: returns the lowest version that the store must keep for a run that
    continues from this version; a thread may call it. checkpoints_inline: the loop's thread writes checkpoints, also
    with `background`, because all ranks take part in them.
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
        checkpoints_inline: bool = False,
    ) -> None:
        self._publisher, self._checkpoints, self._phases = publisher, checkpoints, phases
        self._in_background, self._announced, self._needed = background, announced, needed
        self._checkpoints_inline = checkpoints_inline
        self._versions: Background[Manifest] = Background("publishing")
        self._saves: Background[bool] = Background("checkpoint")
        self.digest = ""
        """Of the version announced last."""
        self.stored = StoredBytes()
        """Of the versions announced."""

    @property
    def pending(self) -> bool:
        """Whether a version is not announced, or `look` has not seen that it is."""
        return self._versions.busy

    def start(self, version: Version, *, now: float) -> Version:
        """Publish the version that a learner starts with; see Publisher.republish. Return its number."""
        manifest = self._publisher.republish(version, now=now)
        self.digest = manifest.digest
        self.stored.add(manifest)
        return manifest.version

    def publish(self, version: Version, checkpoint: Checkpoint | None, *, now: float, durable: bool = True) -> None:
        """Write the checkpoint, if there is one, and publish the model's weights as this version.

        now: Unix time in seconds. durable: announce the version after the commit of its checkpoint, also in the
        background. Inline, raises what Checkpoints.save and Publisher.publish raise; else `look` does.
        """
        if self._in_background:
            if checkpoint is not None and self._checkpoints_inline:
                with self._phases.of("checkpoint"):
                    self.save(checkpoint)
                checkpoint = None
            if checkpoint is not None and (self._saves.busy or not durable):
                with self._phases.of("checkpoint"):
                    self._finish_checkpoint()
                    if not durable:
                        self._saves.begin(partial(self._save, checkpoint.copied()))
            with self._phases.of("publish"):
                prepared = self._publisher.prepare()
            self._versions.begin(partial(self._write, version, prepared, checkpoint if durable else None, now))
            return
        if checkpoint is not None:
            with self._phases.of("checkpoint"):
                self.save(checkpoint)
        with self._phases.of("publish"):
            self._note(self._write(version, self._publisher.prepare(), None, now))

    def save(self, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint now, after one in writing. Return whether it was written; see Checkpoints.save."""
        self._finish_checkpoint()
        return self._save(checkpoint)

    def look(self) -> bool:
        """Return whether all versions are announced. Raises what failed in a thread, Fenced included."""
        if self._saves.done:
            self._saves.collect()
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
        if succeeded:
            self._note(self._versions.collect())
        return succeeded

    def close(self) -> None:
        """Wait a little for the threads: the learner ends. Their errors are lost."""
        for work in (self._versions, self._saves):
            work.wait(LAST_WAIT_S)

    def _write(
        self, version: Version, prepared: tuple[Canary, ...], checkpoint: Checkpoint | None, now: float
    ) -> Manifest:
        if checkpoint is not None:
            self._save(checkpoint)
        failpoints.reach("learner.before_publishing")
        manifest = self._publisher.publish(version, now=now, prepared=prepared)
        kept = self._checkpoints.oldest_version()
        self._publisher.keep_from(self._needed(min(version, kept if kept is not None else Version(0))))
        return manifest

    def _save(self, checkpoint: Checkpoint) -> bool:
        return self._checkpoints.save(checkpoint.progress, checkpoint.tensors)

    def _finish_checkpoint(self) -> None:
        """Wait for a checkpoint in writing. Raises what failed."""
        if self._saves.busy:
            self._saves.collect()

    def _note(self, manifest: Manifest) -> None:
        """The version is announced."""
        self.digest = manifest.digest
        self.stored.add(manifest)
        self._announced(manifest.version, manifest.digest)
