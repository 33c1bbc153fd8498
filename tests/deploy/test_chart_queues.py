"""KEDA scales the workers by the learner's wait, Kueue queues the Jobs, and a JobSet holds the nodes of the learner."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import NAMESPACE, Rendered

pytestmark = pytest.mark.thorough
Render = Callable[..., Rendered]
QUEUE = "kueue.x-k8s.io/queue-name"


def test_the_workers_of_an_autoscaled_release_are_the_target_of_its_scaler(render: Render) -> None:
    rendered = render("keda")
    (scaler,) = rendered.of("ScaledObject").values()
    workers = rendered.of("StatefulSet")[scaler["spec"]["scaleTargetRef"]["name"]]["spec"]
    assert "first-palimpsest-rollout" not in rendered.of("Job")
    assert "replicas" not in workers, "an upgrade would reset the number"
    assert workers["serviceName"] in rendered.of("Service")
    assert workers["template"]["spec"]["restartPolicy"] == "Always"
    index = next(one for one in workers["template"]["spec"]["containers"][0]["env"] if one["name"] == "POD_INDEX")
    assert index["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
    assert (scaler["spec"]["minReplicaCount"], scaler["spec"]["maxReplicaCount"]) == (2, 16)


@pytest.mark.parametrize(
    ("busy_s", "wanted"),
    [
        (60, 0.8),  # never waits: a fifth fewer workers, as waitShare is 0.2
        (48, 1.0),  # waits for a fifth of its time
        (30, 1.6),  # waits for half of it
        (0, 8.0),  # only waits: the busy time is bounded below by a tenth
    ],
)
def test_the_autoscaler_wants_workers_in_proportion_to_the_learners_wait(
    busy_s: int, wanted: float, render: Render, promtool: Callable[..., object], tmp_path: Path
) -> None:
    """The wanted number for each worker is query / threshold. Series: seconds of work in each minute."""
    (scaler,) = render("keda").of("ScaledObject").values()
    (trigger,) = scaler["spec"]["triggers"]
    metric = "palimpsest_learner_phase_seconds_sum"
    labels = f'run="first", namespace="{NAMESPACE}"'
    series = [
        {"series": f'{metric}{{phase="{phase}", {labels}}}', "values": f"0+{seconds}x60"}
        for phase, seconds in (("train", busy_s * 0.75), ("publish", busy_s * 0.25), ("wait", 60 - busy_s))
    ]
    series.append({"series": f'{metric}{{phase="train", run="other", namespace="{NAMESPACE}"}}', "values": "0+60x60"})
    expected = {
        "expr": f"round(({trigger['metadata']['query']}) / {trigger['metadata']['threshold']}, 0.0001)",
        "eval_time": "30m",
        "exp_samples": [{"value": wanted}],
    }
    path = tmp_path / "test.yaml"
    path.write_text(
        yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [expected]}]})
    )
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr  # type: ignore[attr-defined]


def test_queued_jobs_are_suspended_and_name_their_queue(render: Render) -> None:
    rendered = render("kueue", "--set", "kueue.priorityClass=high")
    queued = [*rendered.of("JobSet").values(), rendered.of("Job")["first-palimpsest-rollout"]]
    for document in queued:
        assert document["spec"]["suspend"] is True
        assert document["metadata"]["labels"][QUEUE] == "training"
        assert document["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    others = [one for one in rendered.documents if one not in queued]
    assert not any(QUEUE in one["metadata"].get("labels", {}) or "suspend" in one.get("spec", {}) for one in others)


def test_a_release_without_a_queue_is_not_suspended(render: Render) -> None:
    for document in render("minimal").documents:
        assert "suspend" not in document.get("spec", {})
        assert QUEUE not in document["metadata"]["labels"]


def test_the_nodes_of_a_job_set_start_again_together_unless_the_exit_code_is_final(render: Render) -> None:
    rendered = render("kueue")
    (jobs,) = rendered.of("JobSet").values()
    nodes = {name: one for name, one in rendered.jobs.items() if "-learner-" in name}
    assert list(nodes) == ["first-palimpsest-learner-node-0-0", "first-palimpsest-learner-node-1-0"]
    assert {one["spec"]["backoffLimit"] for one in nodes.values()} == {0}
    policy = jobs["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (20, "BlockingRecreate")
    assert [(one["action"], one["onJobFailureReasons"]) for one in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    service = rendered.of("Service")["first-palimpsest-learner"]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    for node, one in enumerate(nodes.values()):
        spec = one["spec"]["template"]["spec"]
        assert ("persistentVolumeClaim" in next(v for v in spec["volumes"] if v["name"] == "runs")) is (node == 0)
        command = spec["containers"][0]["command"]
        # the host name of pod 0 of an Indexed Job is the Job's name and its index
        host = f"first-palimpsest-learner-node-0-0-0.{spec['subdomain']}.{NAMESPACE}.svc"
        assert {f"--master-addr={host}", f"--node-rank={node}", "--nnodes=2"} <= set(command)
        assert spec["subdomain"] == "first-palimpsest-learner"
