"""Every file of values renders to documents that agree with each other, with the run file and with the code."""

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from palimpsest.common.config.load import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import ExitCode
from tests.deploy.conftest import CHART, NAMESPACE, VALUES, Document, Rendered

pytestmark = pytest.mark.thorough
Render = Callable[..., Rendered]
SECRET = ("PASSWORD", "USERNAME", "TOKEN", "ACCESS_KEY", "ROOT_USER")
FINAL = {ExitCode.CONFIGURATION, ExitCode.DAMAGED, ExitCode.CANARY, ExitCode.REPLACED, ExitCode.STOPPED}
"""Codes after which no other pod may start: it would exit in the same way, or a person stopped the run."""


@pytest.fixture(params=VALUES)
def rendered(request: pytest.FixtureRequest, render: Render) -> Rendered:
    return render(request.param)


def environment(container: Document) -> dict[str, str]:
    """Variables of a container; a reference to a secret is a placeholder, `$(POD_INDEX)` is pod 0."""
    return {one["name"]: one.get("value", "0").replace("$(POD_INDEX)", "0") for one in container.get("env", [])}


def resolved(rendered: Rendered, container: Document, folder: Path) -> RunConfig:
    """The configuration that the program in the container loads."""
    path = folder / "run.toml"
    path.write_text(rendered.run_file)
    return load([str(path)], environment(container), program="palimpsest").config


def matching(selector: Document, pods: dict[str, Document]) -> list[Document]:
    return [pod for pod in pods.values() if selector.items() <= pod["metadata"]["labels"].items()]


@pytest.mark.parametrize("values", VALUES)
def test_lint_finds_nothing(values: str, helm: Callable[..., Any]) -> None:
    done = helm(
        "lint",
        ".",
        "--strict",
        "-f",
        f"values/{values}.yaml",
        "--set",
        "kafka.mode=external,kafka.servers=k:1,autoscaling.enabled=false,monitoring.podMonitor.enabled=false",
        "--set",
        "kueue.queueName=,learner.jobSet.enabled=false",  # lint has no operators
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", ["multi-node", "kueue"])
def test_names_are_unique_and_short_enough_for_a_host_name(values: str, render: Render) -> None:
    rendered = render(values, release="r" * 53)
    names = [(one["kind"], one["metadata"]["name"]) for one in rendered.documents]
    assert len(set(names)) == len(names)
    hosts = [
        f"{name}-{job['spec']['completions'] - 1}"
        for name, job in rendered.jobs.items()
        if "completions" in job["spec"]
    ]
    assert max(map(len, [*hosts, *(name for _, name in names)])) <= 63


def test_every_pod_is_restricted(rendered: Rendered) -> None:
    """The rules of Kubernetes' Pod Security Standard "restricted", and no token of the API server."""
    assert rendered.pods
    for name, spec, container in rendered.containers():
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["serviceAccountName"] in rendered.of("ServiceAccount"), name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name


def test_every_container_has_resources_and_its_volumes(rendered: Rendered) -> None:
    claimed = {name for name, one in rendered.of("StatefulSet").items() if "volumeClaimTemplates" in one["spec"]}
    for name, spec, container in rendered.containers():
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name
        assert container["image"].partition(":")[2] not in ("", "latest"), name
        mounts = [mount["name"] for mount in container["volumeMounts"]]
        own = {volume["name"] for volume in spec["volumes"]} | ({"data"} if name in claimed else set())
        assert sorted(mounts) == sorted(own), name
        variables = [one["name"] for one in container.get("env", [])]
        assert len(set(variables)) == len(variables), name


def test_no_document_holds_a_secret(rendered: Rendered) -> None:
    assert rendered.of("Secret") == {}
    for name, _spec, container in rendered.containers():
        for one in container.get("env", []):
            if one["name"].endswith(SECRET) and one["name"] != "PALIMPSEST_KAFKA_USERNAME":
                assert one.keys() == {"name", "valueFrom"}, f"{name}: {one['name']}"


def test_every_program_loads_the_run_with_the_pods_variables(rendered: Rendered, tmp_path: Path) -> None:
    """An unknown PALIMPSEST_ variable, or a value that the schema refuses, fails the load."""
    services = rendered.of("Service")
    seen = set()
    for _name, _spec, container in rendered.containers():
        if container["name"] in ("minio", "test"):
            continue
        config = resolved(rendered, container, tmp_path)
        assert (config.run.id, config.bus.kind, config.snapshot_store.storage) == ("first", "kafka", "s3")
        for url, section in ((config.store_url, "store"), (config.gateway_url, "gateway")):
            host, _, port = url.removeprefix("http://").partition(":")
            assert host == f"first-palimpsest-{section}"
            assert services[host]["spec"]["ports"][0]["port"] == int(port)
        key = {"store": "snapshot_store", "gateway": "env_gateway"}.get(container["name"], container["name"])
        own = getattr(config, key)
        (http,) = [port["containerPort"] for port in container["ports"] if port["name"] == "http"]
        assert (own.host, own.port) == ("0.0.0.0", http)
        (token,) = [one for one in container["env"] if one["name"] == "PALIMPSEST_SERVICE_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"]["name"], "a service refuses this address without a token"
        seen.add(container["name"])
    assert seen >= {"learner", "rollout", "gateway", "store"}


def test_a_tokens_file_reaches_every_service(render: Render) -> None:
    rendered = render("minimal", "--set", "access.tokensSecret.name=people")
    seen = set()
    for _, pod, container in rendered.containers():
        if "PALIMPSEST_SERVICE_TOKEN" not in environment(container):
            continue
        path = environment(container)["PALIMPSEST_TOKENS_FILE"]
        (mount,) = [one for one in container["volumeMounts"] if path.startswith(one["mountPath"] + "/")]
        (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
        (item,) = volume["secret"]["items"]
        assert (volume["secret"]["secretName"], item["key"]) == ("people", "tokens")
        assert f"{mount['mountPath']}/{item['path']}" == path
        seen.add(container["name"])
    assert seen >= {"learner", "rollout", "gateway", "store"}


def test_a_worker_is_named_by_the_index_of_its_pod(render: Render, tmp_path: Path) -> None:
    containers = {container["name"]: container for _, _, container in render("spot").containers()}
    for container, name in (("rollout", "worker-0"), ("replica", "replica-0")):
        config = resolved(render("spot"), containers[container], tmp_path)
        assert name in (config.rollout.worker, config.replica.name)
        index = next(one for one in containers[container]["env"] if one["name"] == "POD_INDEX")
        assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]


def test_every_service_selects_pods_that_have_its_ports(rendered: Rendered) -> None:
    for name, service in rendered.of("Service").items():
        pods = matching(service["spec"]["selector"], rendered.pods)
        assert pods, name
        for pod in pods:
            ports = {one["name"] for container in pod["spec"]["containers"] for one in container.get("ports", [])}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name


def test_probes_use_a_port_of_their_container(rendered: Rendered) -> None:
    for name, _spec, container in rendered.containers():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container:
                assert container[probe]["httpGet"]["port"] in {one["name"] for one in container["ports"]}, name


def test_a_job_fails_at_once_after_a_code_that_a_restart_would_repeat(rendered: Rendered) -> None:
    for name, job in rendered.jobs.items():
        container = job["spec"]["template"]["spec"]["containers"][0]["name"]
        if container == "test":
            continue
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", name  # a failure policy requires it
        assert job["spec"]["podReplacementPolicy"] == "Failed", name
        disruption, final, stopped = job["spec"]["podFailurePolicy"]["rules"]
        assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert (final["action"], set(final["onExitCodes"]["values"])) == ("FailJob", FINAL), name
        assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [ExitCode.INTERRUPTED]), name
        assert {rule["onExitCodes"]["containerName"] for rule in (final, stopped)} == {container}, name


def test_only_rank_0_has_the_volume_and_the_others_find_it_by_name(render: Render) -> None:
    rendered = render("multi-node")
    jobs = {name: job for name, job in rendered.of("Job").items() if "-learner-" in name}
    assert list(jobs) == [f"first-palimpsest-learner-{node}" for node in range(4)]
    service = rendered.of("Service")["first-palimpsest-learner"]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    for node, job in enumerate(jobs.values()):
        spec = job["spec"]["template"]["spec"]
        (runs,) = [volume for volume in spec["volumes"] if volume["name"] == "runs"]
        assert runs == (
            {"name": "runs", "persistentVolumeClaim": {"claimName": "checkpoints"}}
            if node == 0
            else {"name": "runs", "emptyDir": {}}
        )
        command = spec["containers"][0]["command"]
        assert command[:3] == ["python", "-m", "palimpsest.services.learner.torchrun"]
        assert {"--nnodes=4", f"--node-rank={node}", "--nproc-per-node=8"} <= set(command)
        # the host name of pod 0 of an Indexed Job is the Job's name and its index
        host = f"first-palimpsest-learner-0-0.{spec['subdomain']}.{NAMESPACE}.svc"
        assert f"--master-addr={host}" in command
        assert spec["subdomain"] == "first-palimpsest-learner"
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_a_single_rank_receives_sigterm_itself(render: Render) -> None:
    """torchrun kills its ranks 30 s after SIGTERM, whatever the grace period is."""
    learner = render("minimal").of("Job")["first-palimpsest-learner-0"]["spec"]["template"]["spec"]["containers"][0]
    assert learner["command"] == ["python", "-m", "palimpsest.services.learner", "/etc/palimpsest/run/run.toml"]


def test_a_budget_for_pods_of_a_job_counts_pods_that_stay(rendered: Rendered) -> None:
    """Kubernetes knows no scale of a Job, so it refuses evictions under a percentage or maxUnavailable."""
    for name, budget in rendered.of("PodDisruptionBudget").items():
        selected = budget["spec"]["selector"]["matchLabels"]
        jobs = {key: one["spec"]["template"] for key, one in rendered.jobs.items()}
        assert matching(selected, rendered.pods), name
        if matching(selected, jobs):
            assert isinstance(budget["spec"].get("minAvailable"), int), name


def test_strimzi_gives_the_user_the_rights_of_this_run_only(render: Render, tmp_path: Path) -> None:
    rendered = render("strimzi")
    (name, user), *none = rendered.of("KafkaUser").items()
    learner = rendered.of("Job")["first-palimpsest-learner-0"]["spec"]["template"]["spec"]["containers"][0]
    config = resolved(rendered, learner, tmp_path)
    assert none == []
    assert environment(learner)["PALIMPSEST_KAFKA_USERNAME"] == name
    assert {acl["resource"]["name"] for acl in user["spec"]["authorization"]["acls"]} == {config.topic_prefix}
    assert {acl["resource"]["patternType"] for acl in user["spec"]["authorization"]["acls"]} == {"prefix"}
    (listener,) = rendered.of("Kafka")["log"]["spec"]["kafka"]["listeners"]
    assert config.bus.servers == f"log-kafka-bootstrap:{listener['port']}"
    assert (config.bus.security, listener["tls"]) == ("sasl_tls", True)


def test_the_run_file_arrives_unchanged(render: Render) -> None:
    run = tomllib.loads(render("external").run_file)
    assert run["bus"] == {"security": "sasl_tls", "replicas": 3, "min_insync_replicas": 2}
    assert run["tasks"]["environments"] == {"reasoning_gym.chain_sum": 1.0}


def test_the_run_file_of_one_machine_is_accepted(render: Render) -> None:
    """`--set-file run=examples/cluster.toml`, as the page about Kubernetes shows."""
    example = CHART.parents[2] / "examples" / "cluster.toml"
    rendered = render("minimal", "--set-file", f"run={example}", "--set", "rollout.count=2")
    assert tomllib.loads(rendered.run_file) == tomllib.loads(example.read_text())


def test_the_configuration_of_a_run_cannot_be_upgraded(render: Render) -> None:
    (run,) = [one for one in render("minimal").of("ConfigMap").values() if "run.toml" in one["data"]]
    assert run["immutable"] is True


@pytest.mark.parametrize("keep", ["true", "false"])
def test_the_volume_of_rank_0_stays_if_it_is_kept(render: Render, keep: str) -> None:
    claims = render("minimal", "--set", f"learner.volume.keep={keep}").of("PersistentVolumeClaim")
    annotations = claims["first-palimpsest-learner"]["metadata"].get("annotations", {})
    assert (annotations.get("helm.sh/resource-policy") == "keep") is (keep == "true")


def test_the_notes_name_the_next_three_commands(helm: Callable[..., Any], tmp_path: Path) -> None:
    """Helm prints NOTES.txt only with a cluster, so a copy of the chart renders it as a document."""
    copy = Path(shutil.copytree(CHART, tmp_path / "chart"))
    (copy / "templates" / "NOTES.txt").rename(copy / "notes.txt")
    (copy / "templates" / "notes.yaml").write_text('kind: Notes\ntext: {{ tpl (.Files.Get "notes.txt") . | toJson }}\n')
    done = helm("template", "first", str(copy), "-n", NAMESPACE, "-f", "values/minimal.yaml")
    assert done.returncode == 0, done.stderr
    (notes,) = [one["text"] for one in yaml.safe_load_all(done.stdout) if one and one["kind"] == "Notes"]
    commands = [line.strip() for line in notes.splitlines() if line.startswith("  ")]
    assert [command.split()[:2] for command in commands] == [
        ["helm", "test"],
        ["kubectl", "logs"],
        ["kubectl", "port-forward"],
    ]
    assert "job/first-palimpsest-learner-0 7704" in commands[2]
    assert "for development only" in notes
