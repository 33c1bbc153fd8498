"""Podman with the images of a release, for the tests of one file at a time."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pods.cluster import NETWORK
from tests.pods.podman import Podman
from tools.backends import downloads
from tools.images import light
from tools.images.layers import Entry, write_archive, write_layer

MINIO = "localhost/minio:cached"
"""Name of an image that holds the MinIO of the cache."""
LOCK = Path(tempfile.gettempdir()) / "palimpsest-pods.lock"
"""Two networks that are created at the same time could get the same addresses."""


@contextmanager
def started(*, minio: bool = False) -> Iterator[Podman]:
    """Podman with the light image, and with the image MINIO.

    A machine that makes no namespaces skips the tests, and says why. With CI=true they fail.
    """
    folder = Path(tempfile.mkdtemp(prefix="pods-"))
    podman = Podman(folder)
    try:
        if reason := podman.why_not():
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"not run: {reason}")
        light.build(folder / "light.tar")
        podman("load", "--input", folder / "light.tar")
        if minio:
            _write_minio(folder)
            podman("load", "--input", folder / "minio.tar")
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            podman("network", "create", NETWORK)
            try:
                yield podman
            finally:
                podman("rm", "--all", "--force", "--time=0", check=False)
                podman("network", "rm", "--force", NETWORK, check=False)
    finally:
        podman("system", "reset", "--force", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _write_minio(folder: Path) -> None:
    layer = folder / "layer.tar"
    write_layer({"minio": Entry(downloads.minio(), mode=0o755)}, layer)
    write_archive([layer], {"Entrypoint": ["/minio"]}, [MINIO], folder / "minio.tar")
