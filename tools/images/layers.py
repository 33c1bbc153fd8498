"""Layers and archive of a container image. The same files give the same bytes: no times, no owners of this machine."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

CREATED = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a link or a folder of a layer."""

    content: bytes | Path = b""
    link: str | None = None
    """Target of a symbolic link."""
    mode: int = 0o644
    is_folder: bool = False


Layer = Mapping[str, Entry]
"""Entries by their path without a leading slash."""


def with_folders(layer: Layer) -> dict[str, Entry]:
    """Return the layer with an entry for each folder above its entries."""
    complete = dict(layer)
    for name in layer:
        for parent in PurePosixPath(name).parents:
            if str(parent) != ".":
                complete.setdefault(str(parent), Entry(mode=0o755, is_folder=True))
    return complete


def write_layer(layer: Layer, target: Path) -> None:
    """Write the entries as a tar file, sorted by path, owned by root."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, entry in sorted(with_folders(layer).items()):
            info = tarfile.TarInfo(name)
            info.mode = entry.mode
            if entry.is_folder:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif entry.link is not None:
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
                tar.addfile(info)
            else:
                content = entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_archive(layers: Sequence[Path], settings: Mapping[str, Any], names: Sequence[str], target: Path) -> None:
    """Write an archive that `docker load`, `podman load` and `skopeo` read.

    layers: tar files, the lowest first. settings: the section `config` of the image. names: `repository:tag`.
    """
    digests = [_digest(layer) for layer in layers]
    architecture = "arm64" if any("aarch64" in name for name in _libraries(layers[0])) else "amd64"
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": CREATED,
        "config": dict(settings),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        "history": [{"created": CREATED, "created_by": "tools.images"} for _ in layers],
    }
    text = json.dumps(config, sort_keys=True).encode()
    config_name = f"{hashlib.sha256(text).hexdigest()}.json"
    paths = [f"{digest}/layer.tar" for digest in digests]
    manifest = json.dumps([{"Config": config_name, "RepoTags": list(names), "Layers": paths}]).encode()
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in ((config_name, text), ("manifest.json", manifest)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for path, layer in zip(paths, layers, strict=True):
            info = tarfile.TarInfo(path)
            info.size = layer.stat().st_size
            with layer.open("rb") as content_file:
                tar.addfile(info, content_file)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack all layers of an archive into the folder, as a container engine does."""
    with tarfile.open(archive) as outer:
        manifest_file = outer.extractfile("manifest.json")
        assert manifest_file is not None
        for path in json.load(manifest_file)[0]["Layers"]:
            with tarfile.open(fileobj=outer.extractfile(path)) as layer:
                # the archive is our own; other filters remove the sticky bit of /tmp
                layer.extractall(folder, filter="fully_trusted")  # noqa: S202


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _libraries(layer: Path) -> list[str]:
    with tarfile.open(layer) as tar:
        return [name for name in tar.getnames() if "ld-linux" in name]
