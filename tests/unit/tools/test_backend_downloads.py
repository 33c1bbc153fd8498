"""A program that is missing, too old, or fails is named with what to do, and leaves nothing half done."""

from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import downloads

JAVA_17 = """#!/bin/sh
echo 'openjdk version "17.0.15" 2025-04-15' >&2
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH besides the system's shell; the cache is this test's own."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("nice", "touch"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def silent(_text: str) -> None:
    pass


@pytest.mark.parametrize("missing", ["java", "mvn", "go"])
def test_a_missing_program_is_named_with_what_to_install(programs: Path, missing: str) -> None:
    script(programs / "java", JAVA_17)
    (programs / missing).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"needs `{missing}`, which is not on the PATH: install ") as refusal:
        downloads.minio(silent) if missing == "go" else downloads.kafka(silent)
    assert refusal.value.code == ExitCode.UNAVAILABLE


def test_an_old_java_is_refused_before_anything_is_got(programs: Path) -> None:
    script(programs / "java", JAVA_17.replace("17.0.15", "11.0.2"))
    with pytest.raises(UserError, match=r"Java 17 or later; `java` here is 11"):
        downloads.kafka(silent)


def test_an_old_go_is_refused_before_anything_is_built(programs: Path) -> None:
    script(programs / "go", "#!/bin/sh\necho go version go1.19.8 linux/amd64\n")
    with pytest.raises(UserError, match=r"Go 1\.21 or later; `go` here is go1\.19"):
        downloads.minio(silent)


def test_a_build_that_fails_says_why_and_the_next_call_makes_it(programs: Path, tmp_path: Path) -> None:
    version = '#!/bin/sh\n[ "$1" = version ] && echo go version go1.24.1 linux/amd64 && exit\n'
    script(programs / "go", version + "echo module: connection refused >&2\nexit 1\n")
    with pytest.raises(
        UserError, match=r"(?s)Go could not build MinIO:.*connection refused.*repeat the command"
    ) as refusal:
        downloads.minio(silent)
    assert refusal.value.code == ExitCode.UNAVAILABLE
    script(programs / "go", version + 'touch "$GOBIN/minio"\n')
    made = downloads.minio(silent)
    assert made.is_file()
    assert made.parent.parent == tmp_path / "cache"
    script(programs / "go", "#!/bin/sh\nexit 1\n")
    assert downloads.minio(silent) == made


def test_jars_are_named_by_the_version_that_the_pom_names(programs: Path, tmp_path: Path) -> None:
    script(programs / "java", JAVA_17)
    script(
        programs / "mvn",
        '#!/bin/sh\nfor word; do case $word in -DoutputDirectory=*) touch "${word#*=}/a.jar";; esac; done',
    )
    folder = downloads.kafka(silent)
    assert folder == tmp_path / "cache" / f"kafka-{downloads.kafka_version()}"
    assert [jar.name for jar in folder.iterdir()] == ["a.jar"]
