"""A sharded model that holds one version at a time. Each rank moves its own shards along the deltas in the store.

Each rank reads a version's object, which one rank of a node transfers for all (version_source.py), verifies its digest,
and applies the slices that overlap its shards. After the last step the ranks gather one weight after another, and each
of them verifies the digests of some tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.frames import RawTensor, verify
from palimpsest.common.snapshots.manifest import ITEMSIZE, Damaged, Manifest, TensorEntry
from palimpsest.common.snapshots.walker import VersionSource, Walker
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.checkpoint_names import part_views
from palimpsest.services.learner.model.weights import raw_tensors
from palimpsest.services.learner.old_logprobs.versioned_model import damaged
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.local_shards import LocalPart, local_parts
from palimpsest.services.learner.sharding.sharded_model import ShardedModel, whole


class VersionedShards:
    """See VersionedModel. All ranks must call its methods together."""

    def __init__(self, model: ShardedModel, files: ModelFiles, store: VersionSource, ranks: ProcessGroup) -> None:
        self.model, self._files, self._ranks = model, files, ranks
        own = EditableShards(model, files)
        self._walker = Walker(store, own, held=own.held)

    @property
    def version(self) -> Version | None:
        """None before the first load, and during a load."""
        return self._walker.manifest.version if self._walker.manifest is not None else None

    def expect(self, version: Version) -> None:
        """See MovableModel. Nothing: each rank reads its own slices."""

    def load_version(self, version: Version) -> bool:
        """Move to this version's weights; return False if the model holds them already.

        Raises VersionMissing if the store does not hold the version for every rank, UserError if it is damaged or of
        another model.
        """
        if version == self.version:
            return False
        try:
            error = self._moved(version)
            if any(self._ranks.all_gather_object(error)):
                raise VersionMissing(error or f"version {version} is not in the store for another rank")
            self._verify()
        except VersionMissing:
            self._walker.forget()
            raise
        except (Damaged, ValueError) as error:
            raise damaged(version, error) from None
        return True

    def _moved(self, version: Version) -> str:
        """Move this rank's shards. Return the error if the store lacks the version, else an empty text."""
        try:
            self._walker.move(version)
        except VersionMissing as error:
            return str(error)
        return ""

    @torch.no_grad()
    def _verify(self) -> None:
        """Compare every tensor with its digest. Raises Damaged on all ranks."""
        manifest = self._walker.manifest
        assert manifest is not None
        entries = {entry.name: entry for entry in manifest.tensors}
        fault = ""
        number = 0
        for own, parameter in self.model.shards():
            for tensor in raw_tensors(dict(part_views(self._files.names[own], whole(parameter)))):
                number += 1
                if number % self._ranks.size != self._ranks.rank or fault:
                    continue
                try:
                    verify(entries[tensor.name], tensor.raw, manifest)
                except Damaged as error:
                    fault = str(error)
        if faults := [each for each in self._ranks.all_gather_object(fault) if each]:
            raise Damaged(faults[0])


class EditableShards:
    """A rank's shards, for a Walker to move from version to version in place."""

    def __init__(self, model: ShardedModel, files: ModelFiles) -> None:
        self._own: dict[str, LocalPart] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Of all tensors of the checkpoint, whether the rank holds a part or not."""
        for own, parameter in model.shards():
            names = files.names[own]
            self._own |= {part.name: part for part in local_parts(names, parameter)}
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            self._shapes |= {name: tuple(part.shape) for name, part in part_views(names, empty)}

    def held(self, entry: TensorEntry) -> tuple[int, int]:
        """Return the [start, stop) of the numbers of a tensor, in C order, that this rank holds."""
        part = self._own.get(entry.name)
        if part is None:
            return 0, 0
        width = int(np.prod(part.shape[1:], dtype=np.int64))
        return part.start * width, part.start * width + part.values.numel()

    def load(self, tensors: Iterator[RawTensor], _manifest: Manifest) -> None:
        """See WeightsCopy."""
        missing = set(self._shapes)
        for tensor in tensors:
            self._check(tensor.name, tensor.dtype, tensor.shape)
            missing.discard(tensor.name)
            if (part := self._own.get(tensor.name)) is not None:
                whole_tensor = torch.from_numpy(tensor.raw).view(part.values.dtype).reshape(part.shape)
                rows = whole_tensor[part.start : part.start + len(part.values)] if part.shape else whole_tensor
                part.values.copy_(rows)
        if missing:
            raise ValueError(f"missing tensors: {', '.join(sorted(missing)[:5])}")

    @contextmanager
    def editing(self, entry: TensorEntry) -> Iterator[Bytes]:
        """Open the bytes of `held`; see WeightsCopy."""
        self._check(entry.name, entry.dtype, entry.shape)
        part = self._own.get(entry.name)
        if part is None:
            yield np.empty(0, dtype=np.uint8)
            return
        raw = part.values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield raw
        if part.values.device.type != "cpu":
            part.values.copy_(torch.from_numpy(raw).view(part.values.dtype).reshape(part.values.shape))

    def _check(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != tuple(shape) or ITEMSIZE[dtype] != 2:
            raise ValueError(f"the model has no tensor {name} {dtype} {shape}")
