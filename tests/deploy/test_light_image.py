"""The image of the gateway and the store that tools.images builds: what it holds, and that its programs start.

A container engine needs namespaces; chroot does not. So these tests start the programs in an unpacked image.
"""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tools.images import layers, light

pytestmark = pytest.mark.servers
LIMIT_BYTES = 300_000_000
RUN = 'run.id = "first"\nmodel.path = "none"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 1\n'


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("image") / "light.tar"
    light.build(target)
    return target


@pytest.fixture(scope="module")
def root(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked image."""
    folder = tmp_path_factory.mktemp("root")
    layers.unpack(archive, folder)
    folder.chmod(0o755)  # the root folder of the image's user
    return folder


def inside(root: Path, *command: str) -> str:
    """Output of a command in the image, as its user."""
    user = ("--userspec", light.SETTINGS["User"])
    variables = dict(one.split("=", 1) for one in light.SETTINGS["Env"])
    chroot = shutil.which("chroot", path="/usr/sbin:/sbin:/usr/bin") or "chroot"
    done = subprocess.run([chroot, *user, root, *command], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_small_and_starts_without_root(archive: Path) -> None:
    with tarfile.open(archive) as outer:
        layers_bytes = sum(member.size for member in outer if member.name.endswith("layer.tar"))
        (image,) = json.load(outer.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(outer.extractfile(image["Config"]))  # type: ignore[arg-type]
    assert layers_bytes <= LIMIT_BYTES
    assert config["config"]["User"] == "10001:10001"
    assert image["RepoTags"] == [light.NAME]


def test_it_holds_only_the_pinned_packages_and_what_python_needs(root: Path) -> None:
    pinned = {line.split("==")[0].lower().replace("-", "_") for line in light.pinned()}
    installed = {path.name.split("-")[0].lower() for path in (root / light.SITE).glob("*.dist-info")}
    assert installed - {"palimpsest"} <= pinned
    assert not installed & {"pip", "pyarrow", "setuptools", "torch", "uv"}
    debian = {path.name for path in (root / "var/lib/dpkg/status.d").iterdir()}
    assert "Version: 3.11.2" in (root / "var/lib/dpkg/status.d/python3.11-minimal").read_text()
    assert "python3.11-minimal" in debian
    programs = {path.name for folder in ("bin", "sbin", "usr/bin", "usr/sbin") for path in (root / folder).glob("*")}
    assert programs == {"bwrap", "python3.11"}, "no shell, no package manager, no compiler"


def test_its_files_belong_to_root_and_only_root_changes_them(root: Path) -> None:
    for path in root.rglob("*"):
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (0, 0), path
        assert path.is_symlink() or path == root / "tmp" or not status.st_mode & 0o022, path


def test_its_programs_start_as_the_user_of_the_chart(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.fail("this test needs root, for chroot")
    (root / "tmp" / "run.toml").write_text(RUN)
    for service in ("env_gateway", "snapshot_store"):
        module = f"palimpsest.services.{service}"
        loaded = inside(root, "python", "-c", f"import os, {module}.__main__; print(os.getuid(), {module}.__file__)")
        assert loaded == f"10001 /{light.SITE}/palimpsest/services/{service}/__init__.py\n"
        assert 'id = "first"' in inside(root, "python", "-m", module, "/tmp/run.toml", "--check")
    assert "lookup" in inside(root, "palimpsest", "env", "list")
    datasets = inside(root, "python", "-c", "import reasoning_gym; print(len(reasoning_gym.factory.DATASETS))")
    assert int(datasets) > 50
