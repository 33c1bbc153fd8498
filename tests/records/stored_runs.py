"""Folders of runs on disk, written by the test instead of services."""

from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3
from msgspec import UNSET

from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.codec import encode_base
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import ITEMSIZE, SCHEMA, Manifest, TensorEntry, seal, version_digest
from palimpsest.common.versions import Version

RUN = """
run.id = "{id}"
run.folder = "{folder}"
model.path = "{model}"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
"""


def a_run(home: Path, model: Path) -> Path:
    """A run's folder without published versions."""
    home.mkdir()
    (home / "run.toml").write_text(RUN.format(id=home.name, folder=home.parent, model=model))
    return home


def put(
    home: Path, version: int, tensors: Iterable[RawTensor], *, run: str = "", adapter: Adapter | None = None
) -> Manifest:
    """Write a version into the run's store."""
    entries, body = [], b""
    for tensor in tensors:
        frame = encode_base(tensor.raw, itemsize=ITEMSIZE[tensor.dtype], level=3)
        digest = blake3(tensor.raw.data).hexdigest()
        entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, digest, len(body), len(frame)))
        body += frame
    manifest = Manifest(
        schema=SCHEMA,
        run=run or home.name,
        writer=1,
        version=Version(version),
        digest=version_digest(entries),
        encoding="base",
        object=blake3(body).hexdigest(),
        object_size=len(body),
        tensors=tuple(entries),
        canaries=(),
        adapter=adapter or UNSET,
    )
    for name, text in ((f"objects/{manifest.object}", body), (f"versions/{version:08d}.json", seal(manifest))):
        path = home / "snapshots" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return manifest
