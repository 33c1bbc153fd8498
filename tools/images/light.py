"""The recipe of the light image: what its three layers hold, and how it starts."""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import palimpsest
from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache, commands
from tools.backends.cache import Say
from tools.images import debian
from tools.images.layers import Entry, Layer, write_archive, write_layer
from tools.pip_settings import client_settings

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements" / "light.txt"
SOURCES = ("palimpsest", "common", "services", "pyproject.toml", "README.md", "LICENSE")
USER = 10001
"""User and group of the processes, as in the chart and in the Dockerfiles."""
PREFIX = "opt/palimpsest"
SITE = f"{PREFIX}/lib/python{debian.PYTHON[0]}.{debian.PYTHON[1]}/site-packages"
NAME = f"palimpsest-light:{palimpsest.__version__}"
FROM_DEBIAN = re.compile(
    r"((usr/)?lib(64)?/.*|usr/bin/(python3\.11|bwrap)|usr/share/doc/[^/]+/copyright|etc/(mime\.types|python3\.11/.*)"
    r"|var/lib/dpkg/status\.d/.*)"
)
NOT_FROM_DEBIAN = re.compile(
    r".*/gconv/.*|.*/perl.*|usr/lib/python3\.11/(lib2to3|pydoc_data|ensurepip|distutils)/.*|usr/lib/(dpkg|mime|tmpfiles\.d)/.*"
    r"|(usr/)?lib/(systemd|udev|init)/.*|.*/audit/.*"
)
LEFT_OUT = ("pyarrow",)
"""The extra `datasets`: 160 MB. An environment that reads Parquet or Arrow says that it needs it."""
NOT_OF_A_PACKAGE = re.compile(
    r"\.lock|bin/.*|(.*/)?(tests|__pycache__)/.*|.*\.(pyi|pyx|pxd|c|cpp|h|hpp|a)|zstandard/_cffi\..*"
)
"""Programs, tests, sources of C, types; and zstandard's second backend, which only PyPy uses."""
NOT_COMPILED = (
    r"/(fontTools|matplotlib|mpl_toolkits|pygments|Crypto|PIL|kafka|sympy|mpmath|numpy/(f2py|distutils|typing))/"
)
"""Large packages of which the services import little."""
LARGE = 100_000
SETTINGS = {
    "User": f"{USER}:{USER}",
    "WorkingDir": "/tmp",  # noqa: S108
    "Env": [f"PATH=/{PREFIX}/bin:/usr/bin", "LANG=C.UTF-8", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"],
    "Labels": {
        "org.opencontainers.image.title": "palimpsest-light",
        "org.opencontainers.image.version": palimpsest.__version__,
        "org.opencontainers.image.licenses": "Apache-2.0",
    },
}


def build(target: Path, say: Say = debian.announce) -> None:
    """Write the archive of the image. Raises UserError."""
    if sys.version_info[:2] != debian.PYTHON:
        wanted = ".".join(map(str, debian.PYTHON))
        raise UserError(
            f"the image has the Python {wanted} of Debian {debian.SUITE}, and this environment has "
            f"{sys.version_info[0]}.{sys.version_info[1]}: its compiled packages do not fit. Make an environment with "
            f"that version (make setup PYTHON=/path/to/python{wanted}), or build deploy/docker/light.Dockerfile"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".image-") as name:
        code, partial = Path(name) / "code.tar", Path(name) / "image.tar"
        write_layer(_code(Path(name)), code)
        write_archive([system_layer(say), packages_layer(say), code], SETTINGS, [NAME], partial)
        partial.rename(target)
    say(f"{target} is ready: {NAME}, {target.stat().st_size / 1e6:.0f} MB")


def system_layer(say: Say = debian.announce) -> Path:
    """Return the tar file with Python, its libraries and the user. Raises UserError."""
    base = debian.base(say)

    def make(partial: Path) -> None:
        with tarfile.open(base) as tar:
            write_layer({**dict(_kept_of(tar)), **_user()}, partial / "layer.tar")

    return cache.made(f"light-system-{_digest(base.read_bytes())}", make, say) / "layer.tar"


def pinned() -> list[str]:
    """Return the lines `package==version` of the image."""
    lines = REQUIREMENTS.read_text().splitlines()
    return [line for line in lines if "==" in line and line[0] != "#" and line.split("==")[0] not in LEFT_OUT]


def packages_layer(say: Say = debian.announce) -> Path:
    """Return the tar file with the packages of requirements/light.txt. Raises UserError."""

    def make(partial: Path) -> None:
        say("installing the packages of requirements/light.txt for the image, once")
        with tempfile.TemporaryDirectory(dir=partial.parent) as folder:
            listed = Path(folder) / "requirements.txt"
            listed.write_text("\n".join(pinned()))
            _uv("install", "--target", f"{folder}/site", "--no-deps", "-r", str(listed))
            write_layer(_site(Path(folder) / "site"), partial / "layer.tar")

    return cache.made(f"light-packages-{_digest(REQUIREMENTS.read_bytes())}", make, say) / "layer.tar"


def _code(folder: Path) -> Layer:
    """Install the wheel of this checkout. The wheel is built from a copy, because setuptools writes into its folder."""
    source, site = folder / "source", folder / "site"
    for name in SOURCES:
        original = ROOT / name
        if original.is_dir():
            shutil.copytree(original, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(original, source / name)
    _uv("install", "--target", str(site), "--no-deps", "--no-build-isolation", str(source))
    home = "home = /usr/bin\ninclude-system-site-packages = false\n"
    start = f"#!/{PREFIX}/bin/python\nimport sys\n\nfrom palimpsest.cli import main\n\nsys.exit(main())\n"
    return {
        **_site(site),
        f"{PREFIX}/pyvenv.cfg": Entry(home.encode()),
        f"{PREFIX}/bin/python": Entry(link="/usr/bin/python3.11"),
        f"{PREFIX}/bin/palimpsest": Entry(start.encode(), mode=0o755),
    }


def _site(folder: Path) -> Layer:
    """Return the files of the packages in this folder, without debugging information and with bytecode.

    The file system of a pod is read-only: without bytecode every start would compile every module.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and NOT_OF_A_PACKAGE.fullmatch(path.relative_to(folder).as_posix()):
            path.unlink()
    # libraries in *.libs were changed by auditwheel, which strip can break
    large = [str(path) for path in folder.rglob("*.so") if path.stat().st_size > LARGE and ".libs/" not in str(path)]
    if large:
        strip = commands.program("strip", "making the image small", "binutils")
        _run([strip, "--strip-debug", *large], "strip could not remove debugging information")
    _run(
        [sys.executable, "-W", "ignore", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash",
         "-s", str(folder), "-p", f"/{SITE}", "-x", NOT_COMPILED, str(folder)],
        "Python could not compile the packages of the image",
    )  # fmt: skip
    return {
        f"{SITE}/{path.relative_to(folder).as_posix()}": Entry(
            path, mode=0o755 if path.stat().st_mode & 0o100 else 0o644
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _kept_of(tar: tarfile.TarFile) -> Iterator[tuple[str, Entry]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if not FROM_DEBIAN.fullmatch(name) or NOT_FROM_DEBIAN.fullmatch(name):
            continue
        if member.issym():
            yield name, Entry(link=member.linkname)
        elif member.isfile() or member.islnk():
            content = tar.extractfile(member)
            assert content is not None
            yield name, Entry(content.read(), mode=member.mode & 0o755)


def _user() -> Layer:
    return {
        "etc/passwd": Entry(f"root:x:0:0::/root:/\npalimpsest:x:{USER}:{USER}::/tmp:/\n".encode()),
        "etc/group": Entry(f"root:x:0:\npalimpsest:x:{USER}:\n".encode()),
        "tmp": Entry(mode=0o1777, is_folder=True),
        **{name: Entry(mode=0o755, is_folder=True) for name in ("dev", "proc", "runs", "sys")},
        # programs that look for Debian's CA certificates find those of certifi
        "etc/ssl/certs/ca-certificates.crt": Entry(link=f"/{SITE}/certifi/cacert.pem"),
        "usr/lib/ssl/cert.pem": Entry(link=f"/{SITE}/certifi/cacert.pem"),
    }


def _uv(*words: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    settings = client_settings(Path(sys.executable).with_name("pip"))
    # strip must not change the files of uv's cache
    settings["UV_LINK_MODE"] = "copy"
    command = [str(uv), "pip", *words, "--python", sys.executable, "--quiet"]
    _run(command, "uv could not install the packages of the image", settings)


def _run(command: list[str], failure: str, settings: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise UserError(f"{failure}:\n  {tail}", ExitCode.UNAVAILABLE)


def _digest(content: bytes) -> str:
    """Return a digest of the content and of this recipe, as part of a name in the cache."""
    recipe = (Path(__file__).read_bytes(), Path(__file__).with_name("layers.py").read_bytes())
    return hashlib.sha256(b"\0".join([content, *recipe])).hexdigest()[:16]
