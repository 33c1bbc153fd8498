"""A missing, too old, or failing program is named with a remedy and leaves no incomplete entry."""

import re
from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import downloads

JAVA_17 = """#!/bin/sh
echo 'openjdk version "17.0.15" 2025-04-15' >&2
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH; the cache is in the test's folder."""
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


def no_output(_text: str) -> None:
    pass


@pytest.mark.parametrize("missing", ["java", "mvn", "go", "apt-get"])
def test_a_missing_program_is_named_with_its_package(programs: Path, missing: str) -> None:
    script(programs / "java", JAVA_17)
    (programs / missing).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"needs `{missing}`, which is not on the PATH: install ") as error:
        {"go": downloads.minio, "apt-get": downloads.prometheus}.get(missing, downloads.kafka)(no_output)
    assert error.value.code == ExitCode.UNAVAILABLE


def test_an_old_java_is_refused_before_the_download(programs: Path) -> None:
    script(programs / "java", JAVA_17.replace("17.0.15", "11.0.2"))
    with pytest.raises(UserError, match=r"Java 17 or later; `java` here is 11"):
        downloads.kafka(no_output)


def test_an_old_go_is_refused_before_the_build(programs: Path) -> None:
    script(programs / "go", "#!/bin/sh\necho go version go1.19.8 linux/amd64\n")
    with pytest.raises(UserError, match=r"Go 1\.21 or later; `go` here is go1\.19"):
        downloads.minio(no_output)


def test_a_failed_build_is_reported_and_repeated_by_the_next_call(programs: Path, tmp_path: Path) -> None:
    version = '#!/bin/sh\n[ "$1" = version ] && echo go version go1.24.1 linux/amd64 && exit\n'
    script(programs / "go", version + "echo module: connection refused >&2\nexit 1\n")
    with pytest.raises(
        UserError, match=r"(?s)Go could not build MinIO:.*connection refused.*repeat the command"
    ) as error:
        downloads.minio(no_output)
    assert error.value.code == ExitCode.UNAVAILABLE
    script(programs / "go", version + 'touch "$GOBIN/minio"\n')
    made = downloads.minio(no_output)
    assert made.is_file()
    assert made.parent.parent == tmp_path / "cache"
    script(programs / "go", "#!/bin/sh\nexit 1\n")
    assert downloads.minio(no_output) == made


def test_the_folder_of_jars_has_the_version_of_the_pom(programs: Path, tmp_path: Path) -> None:
    script(programs / "java", JAVA_17)
    script(
        programs / "mvn",
        '#!/bin/sh\nfor word; do case $word in -DoutputDirectory=*) touch "${word#*=}/a.jar";; esac; done',
    )
    folder = downloads.kafka(no_output)
    assert folder == tmp_path / "cache" / f"kafka-{downloads.kafka_version()}"
    assert [jar.name for jar in folder.iterdir()] == ["a.jar"]


def test_helm_is_built_for_the_version_of_kubernetes_that_the_chart_needs(programs: Path) -> None:
    version = '#!/bin/sh\n[ "$1" = version ] && echo go version go1.26.8 linux/amd64 && exit\n'
    script(programs / "go", version + 'echo "$@" > "$GOBIN/helm"\n')
    command = downloads.helm(no_output).read_text()
    assert f"version.version={downloads.HELM_VERSION} " in command
    assert "pkg/chartutil.k8sVersionMinor=36" in command
    assert command.endswith(f"helm.sh/helm/v3/cmd/helm@{downloads.HELM_VERSION}\n")


def test_the_folder_of_prometheus_has_the_two_programs_of_the_package(programs: Path, tmp_path: Path) -> None:
    (programs / "mkdir").symlink_to("/usr/bin/mkdir")
    script(programs / "apt-get", '#!/bin/sh\n[ "$1" = download ] && touch "${2%%=*}_2.deb"\n')
    script(
        programs / "dpkg-deb",
        '#!/bin/sh\nmkdir -p "$3/usr/bin" "$3/etc" && touch "$3/usr/bin/prometheus" "$3/usr/bin/promtool"\n',
    )
    folder = downloads.prometheus(no_output)
    assert folder == tmp_path / "cache" / f"prometheus-{downloads.PROMETHEUS_VERSION}"
    assert sorted(path.name for path in folder.iterdir()) == ["prometheus", "promtool"]


def test_a_failed_download_of_prometheus_says_where_to_put_the_programs(programs: Path, tmp_path: Path) -> None:
    script(programs / "apt-get", "#!/bin/sh\necho not found >&2\nexit 100\n")
    script(programs / "dpkg-deb", "#!/bin/sh\n")
    with pytest.raises(
        UserError, match=rf"(?s)put the programs .* into {tmp_path}/cache/prometheus-2.42.0\):.*not found"
    ):
        downloads.prometheus(no_output)


GO = '#!/bin/sh\n[ "$1" = version ] && echo go version go1.26.8 linux/amd64 && exit\n'
BUILDS = GO + 'while [ "$1" != -o ]; do shift; done\necho "$3" "$PWD" > "$2/{name}"\n'


@pytest.mark.parametrize(
    ("name", "package", "folder"),
    [
        ("kubernetes", ".", "kubernetes"),
        ("helm-unittest", "github.com/helm-unittest/helm-unittest/cmd/helm-unittest", "helm_unittest"),
        ("grafana", ".", "grafana"),
    ],
)
def test_a_program_is_built_from_the_module_that_pins_its_sources(
    programs: Path, name: str, package: str, folder: str
) -> None:
    script(programs / "go", BUILDS.replace("{name}", name))
    makers = {
        "kubernetes": downloads.kubernetes,
        "helm-unittest": downloads.helm_unittest,
        "grafana": downloads.dashboard_reader,
    }
    made = makers[name](no_output)
    assert made.read_text().split() == [package, str(downloads.GO_MODULES / folder)]


@pytest.mark.parametrize(
    ("folder", "module", "version"),
    [
        ("kubernetes", "k8s.io/kubernetes", downloads.KUBERNETES_VERSION),
        ("helm_unittest", "github.com/helm-unittest/helm-unittest", downloads.HELM_UNITTEST_VERSION),
        ("grafana", "github.com/grafana/grafana-foundation-sdk/go", downloads.GRAFANA_SCHEMA_VERSION),
    ],
)
def test_the_version_of_a_cache_entry_is_that_of_its_module(folder: str, module: str, version: str) -> None:
    requirements = (downloads.GO_MODULES / folder / "go.mod").read_text()
    assert re.search(rf"^\s*(require )?{re.escape(module)} v(\S+)", requirements, re.MULTILINE)[2] == version  # type: ignore[index]
    assert f"{module} v{version} h1:" in (downloads.GO_MODULES / folder / "go.sum").read_text()


def test_the_chart_is_rendered_for_the_version_of_the_api_server() -> None:
    assert downloads.KUBERNETES_VERSION.startswith("{}.{}.".format(*downloads.KUBERNETES))


def test_etcd_is_the_program_of_the_package(programs: Path, tmp_path: Path) -> None:
    (programs / "mkdir").symlink_to("/usr/bin/mkdir")
    script(programs / "apt-get", '#!/bin/sh\n[ "$1" = download ] && touch "${2%%=*}_3.deb"\n')
    script(programs / "dpkg-deb", '#!/bin/sh\nmkdir -p "$3/usr/bin" && touch "$3/usr/bin/etcd"\n')
    assert downloads.etcd(no_output) == tmp_path / "cache" / f"etcd-{downloads.ETCD_VERSION}" / "etcd"


def test_the_definitions_of_the_operators_are_copied_from_their_modules(programs: Path, tmp_path: Path) -> None:
    module = tmp_path / "module"
    for pattern in downloads.OPERATOR_CRDS.values():
        path = module / pattern.replace("*", "objects")
        path.parent.mkdir(parents=True)
        path.write_text("definition")
    script(programs / "go", GO + f'echo \'{{"Dir": "{module}"}}\'\n')
    assert sorted(path.name for path in downloads.operator_crds(no_output).iterdir()) == [
        "keda.sh_objects.yaml", "objects.yaml",
    ]  # fmt: skip
    assert len({path.parent for path in module.rglob("*.yaml")}) == len(downloads.OPERATOR_CRDS)
