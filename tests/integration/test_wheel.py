"""The installed wheel, without the checkout, and with user packages named common and services."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT, history, scripted

pytestmark = pytest.mark.servers
UV = Path(sys.executable).with_name("uv")
TOPS = ("palimpsest", "common", "services")
OTHERS = ("pyproject.toml", "README.md", "LICENSE")
FOREIGN = "raise RuntimeError('this package is the user\\'s own')\n"


def done(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. Only the working folder and the environment's packages can be imported."""
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=outside, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def sources() -> list[Path]:
    """Files of the package and of its build, including untracked ones, as paths from the root."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *TOPS, *OTHERS]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in names if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy, dist = folder / "source", folder / "dist"
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    flags = ("--offline", "--no-build-isolation", "--python", sys.executable)
    build = done(UV, "build", *flags, "--out-dir", dist, copy, cwd=folder)
    assert build.returncode == 0, build.stderr
    return dist


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    made = done(UV, "venv", "--offline", "--python", sys.executable, folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    put = done(UV, "pip", "install", "--offline", "--no-deps", "--python", python, wheel, cwd=folder.parent)
    assert put.returncode == 0, put.stderr
    (own,) = (folder / "lib").glob("python3*/site-packages")
    (ours,) = Path(sys.prefix, "lib").glob("python3*/site-packages")
    # .pth files in that folder, including the editable install, are not read
    (own / "dependencies.pth").write_text(f"{ours}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with user packages that have the names of two folders of the repository."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("common", "services"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(FOREIGN)
    return folder


def test_the_only_package_of_the_wheel_is_palimpsest(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"palimpsest"}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    """Files of a folder without __init__.py would be missing."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("palimpsest/")}
    tracked = {
        str(path if path.parts[0] == "palimpsest" else Path("palimpsest", path))
        for path in sources()
        if path.parts[0] in TOPS and not (ROOT / path).is_symlink()
    }
    assert "palimpsest/py.typed" in packed
    assert packed == tracked


def test_no_plain_dependency_of_the_wheel_needs_a_compiler(wheel: Path) -> None:
    """reasoning-gym depends on pycosat, which has no wheels, so it is an extra."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    assert [line for line in lines if line.startswith("Requires-Dist: reasoning-gym")] == [
        'Requires-Dist: reasoning-gym==0.1.25; extra == "reasoning-gym"'
    ]


def test_the_sdist_has_no_links(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive if not (member.isfile() or member.isdir())] == []


def test_imports_come_from_the_wheel(installed: Path, work: Path) -> None:
    result = done(installed / "python", "-c", "import palimpsest.env, sys; print(sys.modules['palimpsest'])", cwd=work)
    assert str(installed.parent / "lib") in result.stdout, result.stderr


def test_an_import_finds_the_user_s_package_first(installed: Path, work: Path) -> None:
    """`python -m` searches the working folder first, so an import of `common` would end every service."""
    result = done(installed / "python", "-c", "import common", cwd=work)
    assert "this package is the user's own" in result.stderr


def test_the_check_command_works(installed: Path, work: Path, starting_model: Path) -> None:
    result = done(installed / "palimpsest", "check", scripted(work, starting_model, versions=4), cwd=work)
    assert (result.returncode, result.stderr) == (0, "")
    assert "versions = 4" in result.stdout


def test_the_doctor_works_without_a_checkout(installed: Path, work: Path) -> None:
    result = done(installed / "palimpsest", "doctor", cwd=work)
    assert result.returncode in (0, 3), result.stderr
    assert result.stdout.startswith("Palimpsest ")
    assert "checks whether runs can start" in result.stdout.splitlines()[0]
    assert "Checkout" not in result.stdout
    assert str(work / "runs") in result.stdout


def test_a_run_trains_four_versions(installed: Path, work: Path, starting_model: Path) -> None:
    run = scripted(work, starting_model, versions=4)
    result = done(installed / "palimpsest", "run", run, cwd=work)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["version"] for line in history(work / "scripted")] == [0, 1, 2, 3]
    assert (work / "scripted" / "report.html").is_file()
