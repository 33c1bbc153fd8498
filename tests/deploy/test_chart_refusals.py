"""Values that contradict each other or the run file are refused with a sentence that names the value."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(
    ("values", "settings", "sentence"),
    [
        ("minimal", ["bogus=1"], "'bogus' not allowed"),
        ("minimal", ["rollout.gpu.cuont=1"], "'cuont' not allowed"),
        ("minimal", ["learner.nodes=0"], "minimum"),
        ("minimal", ["rollout.count=two"], "got string, want integer"),
        ("minimal", ["objectStore.mode=folder"], "'external', 'minio'"),
        ("minimal", ["images.gpu.digest=sha256:1"], "does not match pattern"),
        ("minimal", ["kafka.servers=kafka"], "does not match pattern"),
        ("minimal", ["run="], "run is empty: pass the run file"),
        ("minimal", ["run=[model"], "run is not valid TOML"),
        ("minimal", ["run=[model]"], "run has no section [tasks]"),
        ("minimal", ["kafka.servers="], "kafka.servers is empty"),
        ("minimal", ["gateway.tokenSecret.name="], "gateway.tokenSecret.name is empty"),
        ("minimal", ["objectStore.credentialsSecret.name="], "objectStore.credentialsSecret.name is empty"),
        ("minimal", ["objectStore.mode=external"], "objectStore.endpoint must be the URL"),
        ("minimal", ["model.image=a:1"], "model.claim and model.image are both set"),
        ("minimal", ["rollout.count=9"], "rollout.count is 9, but run has 8 task partitions"),
        ("minimal", ["replica.count=1"], 'replica.count is 1, but learner.proximal.kind in run is "snapshot"'),
        ("spot", ["replica.count=0"], 'learner.proximal.kind in run is "replica", but replica.count is 0'),
        ("spot", ["rollout.minAvailable=16"], "rollout.minAvailable is 16 of 16 pods"),
        ("multi-node", ["learner.gpu.count=4"], "learner.ranksPerNode is 8, but each learner pod has 4 GPUs"),
        ("keda", ["autoscaling.max=17"], "autoscaling.max is 17, but run has 16 task partitions"),
        ("keda", ["autoscaling.min=17"], "autoscaling.min is 17, which is more than autoscaling.max (16)"),
        ("keda", ["autoscaling.prometheus="], "autoscaling.prometheus is empty"),
        ("keda", ["autoscaling.prometheus=prometheus:9090"], "does not match pattern"),
        ("keda", ["autoscaling.waitShare=1"], "maximum"),
        ("keda", ["kueue.queueName=training"], "autoscaling.enabled and kueue.queueName are both set"),
        ("keda", ["rollout.minAvailable=2"], "rollout.minAvailable is 2 of 2 pods"),
        ("kueue", ["learner.jobSet.enabled=false"], "learner.nodes is 2 with kueue.queueName"),
        ("minimal", ["kueue.priorityClass=high"], "kueue.priorityClass is set, but kueue.queueName is empty"),
        ("strimzi", ["kafka.strimzi.cluster="], "kafka.strimzi.cluster is empty"),
    ],
)
def test_wrong_values_are_refused(
    values: str, settings: list[str], sentence: str, template: Callable[..., Any]
) -> None:
    done = template(values, *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode != 0
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("kafka.mode=strimzi,kafka.strimzi.cluster=log", "kafka.strimzi.io/v1: install the Strimzi operator"),
        ("autoscaling.enabled=true,autoscaling.prometheus=http://p:9090", "keda.sh/v1alpha1: install KEDA"),
        ("kueue.queueName=training", "kueue.x-k8s.io: the Jobs would wait for ever; install Kueue"),
        ("learner.jobSet.enabled=true", "jobset.x-k8s.io/v1alpha2: install JobSet"),
        ("monitoring.rules.enabled=true", "monitoring.coreos.com/v1: install the Prometheus operator"),
    ],
)
def test_objects_of_an_operator_are_refused_in_a_cluster_without_it(
    settings: str, sentence: str, template: Callable[..., Any]
) -> None:
    done = template("minimal", "--set", settings)
    assert done.returncode != 0
    assert f"the cluster does not have {sentence}" in done.stderr
