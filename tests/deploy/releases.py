"""Releases of the files of values on a cluster without operators: the test does what an operator would do."""

from tests.deploy.cluster import COMPONENT, Cluster
from tests.deploy.conftest import Document, Rendered
from tests.servers.kubernetes_client import Refused

WAIT = ("--wait", "--timeout", "15m")
CLAIMS = {"strimzi": (), "multi-node": ("model", "checkpoints")}
"""Claims that the values name. Others name `model`."""
SETTINGS = {
    "external": tuple(f"--set=monitoring.{part}.enabled=true" for part in ("podMonitor", "rules", "dashboards"))
}
NAME = "first-palimpsest"
JOBSET = "jobset.x-k8s.io/v1alpha2", "JobSet", f"{NAME}-learner"
WORKERS = f"{NAME}-rollout"


class Release:
    """The release `first` of one file of values, in a namespace with the name of the file."""

    def __init__(self, cluster: Cluster, values: str, rendered: Rendered) -> None:
        self.cluster, self.values, self.rendered = cluster, values, rendered
        self.space = cluster.namespace(values, *CLAIMS.get(values, ("model",)))
        self.before = cluster.names(self.space)
        self.helm("install", "first", ".")

    def helm(self, *command: str) -> str:
        """Run a command of Helm with the values. Return its output."""
        given = ("-f", f"values/{self.values}.yaml", *SETTINGS.get(self.values, ()))
        return self.cluster.done(*command, "-n", self.space, *given, *WAIT)

    def begin(self) -> "Release":
        """Do what KEDA, Kueue and JobSet do after an installation, and wait until every pod runs."""
        scalers = self.rendered.of("ScaledObject")
        for one in scalers.values():
            self.scale(max(one["spec"]["minReplicaCount"], len(self.pods("rollout"))))
        if "JobSet" in {one["kind"] for one in self.rendered.documents}:
            self._create_jobs_of_the_set()
        self.resume()
        return self

    def resume(self) -> None:
        """End the suspension of the Jobs and of the JobSet, as Kueue does, and wait until every pod runs."""
        go = {"spec": {"suspend": False}}
        if self.cluster.kubernetes.get(*JOBSET, self.space):
            self.cluster.kubernetes.patch(*JOBSET, go, self.space)
        for one in self.jobs():
            if one["spec"]["suspend"]:
                self.cluster.kubernetes.patch("batch/v1", "Job", one["metadata"]["name"], go, self.space)
        for component, number in self.numbers().items():
            self.wait(component, number)

    def scale(self, replicas: int) -> None:
        """Set the number of workers, as KEDA's autoscaler does."""
        change = {"spec": {"replicas": replicas}}
        self.cluster.kubernetes.patch("apps/v1", "StatefulSet", WORKERS, change, self.space, "scale")

    def numbers(self) -> dict[str, int]:
        """Pods of each component that the documents ask for; with KEDA as many workers as its object has now."""
        found: dict[str, int] = {}
        owners = self.rendered.jobs | self.rendered.of("Deployment") | self.rendered.of("StatefulSet")
        for name, one in owners.items():
            spec = one["spec"]
            component = spec["template"]["metadata"]["labels"][COMPONENT]
            if component == "test":
                continue
            number = spec.get("parallelism", spec.get("replicas"))
            if number is None:
                live = self.cluster.kubernetes.get("apps/v1", "StatefulSet", name, self.space)
                assert live is not None, name
                number = live["spec"]["replicas"]
            found[component] = found.get(component, 0) + number
        return found

    def jobs(self) -> list[Document]:
        """The Jobs of the release that exist now."""
        return self.cluster.kubernetes.list("batch/v1", "Job", self.space)

    def failed(self) -> dict[str, int]:
        """Number of failed pods that each Job has counted. No Job may have failed."""
        jobs = self.jobs()
        ended = [one["metadata"]["name"] for one in jobs for it in one["status"].get("conditions", [])
                 if it["type"] == "Failed"]  # fmt: skip
        assert not ended
        return {one["metadata"]["name"]: one["status"].get("failed", 0) for one in jobs}

    def pods(self, component: str) -> list[Document]:
        """Pods of a component that run."""
        return self.cluster.pods(self.space, component)

    def wait(self, component: str, number: int) -> set[str]:
        """Wait for this number of running pods; return their ids."""
        self.cluster.until(
            lambda: len(self.pods(component)) == number, f"{number} pods of {component} in {self.space}"
        )  # fmt: skip
        return self.ids(component)

    def ids(self, *components: str) -> set[str]:
        """Ids of the running pods of these components. Default: of all."""
        return {one["metadata"]["uid"] for part in components or self.numbers() for one in self.pods(part)}

    def evict(self, name: str) -> None:
        """Evict a pod, as the drain of a node does. A drain asks again while a budget does not permit it yet."""

        def permitted() -> bool:
            try:
                self.cluster.kubernetes.evict(name, self.space)
            except Refused as refused:
                if refused.code == 429:
                    return False
                raise
            return True

        self.cluster.until(permitted, f"the eviction of {name}")

    def kept(self) -> set[str]:
        """Claims that stay after an uninstallation."""
        created = {
            name
            for name, one in self.rendered.of("PersistentVolumeClaim").items()
            if one["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
        }
        if f"{NAME}-minio" in self.rendered.of("StatefulSet"):
            created.add(f"data-{NAME}-minio-0")
        return {f"PersistentVolumeClaim/{name}" for name in created}

    def _create_jobs_of_the_set(self) -> None:
        """Create the Jobs that JobSet creates, owned by the JobSet, if they do not exist."""
        owner = self.cluster.kubernetes.get(*JOBSET, self.space)
        assert owner is not None
        reference = {
            "apiVersion": JOBSET[0],
            "kind": JOBSET[1],
            "name": JOBSET[2],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        existing = {one["metadata"]["name"] for one in self.jobs()}
        for name, job in self.rendered.jobs.items():
            if name.startswith(f"{NAME}-learner-") and name not in existing:
                metadata = {**job["metadata"], "name": name, "ownerReferences": [reference]}
                whole = {"apiVersion": "batch/v1", "kind": "Job", **job, "metadata": metadata}
                self.cluster.kubernetes.create(whole, self.space)
