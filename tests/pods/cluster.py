"""Plays the controllers of Jobs, Deployments and StatefulSets over containers of Podman."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tests.pods import translation
from tests.pods.podman import Podman
from tests.pods.translation import Document, Objects

NETWORK = "pods"
End = Literal["replaced", "ignored", "failed", "done"]


@dataclass
class Workload:
    """A Job, Deployment or StatefulSet with one pod for each index."""

    document: Document
    names: list[str]
    """Names of the services that select its pods."""
    pods: dict[int, str] = field(default_factory=dict)
    """Container of each index that has one."""
    ends: list[tuple[int, End]] = field(default_factory=list)
    """Exit code of each ended container, and what the controller made of it."""
    failures: int = 0
    evicted: set[str] = field(default_factory=set)

    @property
    def is_job(self) -> bool:
        return self.document["kind"] == "Job"


class Cluster:
    """The workloads of a release. `tend` does what the controllers would do now."""

    def __init__(
        self, podman: Podman, documents: list[Document], objects: Objects, folder: Path,
        *, extra: Mapping[Path, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.podman, self._objects, self._folder, self._extra = podman, objects, folder, extra
        services = [one for one in documents if one["kind"] == "Service"]
        self.workloads: dict[str, Workload] = {}
        for one in documents:
            if one["kind"] not in ("Job", "Deployment", "StatefulSet") or "helm.sh/hook" in one["metadata"].get(
                "annotations", {}
            ):
                continue
            labels = one["spec"]["template"]["metadata"]["labels"].items()
            names = [s["metadata"]["name"] for s in services if s["spec"]["selector"].items() <= labels]
            self.workloads[one["metadata"]["name"]] = Workload(one, names)
        self._number = 0
        self._started: list[str] = []

    def start(self) -> None:
        """Start every pod."""
        for name, workload in self.workloads.items():
            spec = workload.document["spec"]
            for index in range(spec.get("completions", spec.get("replicas", 1))):
                self._start(name, index)

    def start_one(self, name: str) -> str:
        """Start the first pod of a workload. Returns its container."""
        self._start(name, 0)
        return self.workloads[name].pods[0]

    def tend(self) -> None:
        """Replace ended pods as their controllers do."""
        for name, workload in self.workloads.items():
            for index, container in list(workload.pods.items()):
                state = self.podman.state(container)
                if state["Status"] in ("exited", "stopped"):
                    del workload.pods[index]
                    code = int(state["ExitCode"])
                    end = self._decide(workload, container, code)
                    workload.ends.append((code, end))
                    if end in ("replaced", "ignored"):
                        self._start(name, index)

    def kill(self, workload: str, index: int = 0) -> None:
        """SIGKILL, as after a crash of the program."""
        self.podman("kill", "--signal=KILL", self.workloads[workload].pods[index])

    def evict(self, workload: str, index: int = 0) -> None:
        """SIGTERM, and SIGKILL after the grace period. Returns when the container has ended."""
        container = self.workloads[workload].pods[index]
        self.workloads[workload].evicted.add(container)
        self.podman("stop", container)

    def remove(self) -> None:
        """Remove every container of the release."""
        self.podman("rm", "--force", "--time=0", *self._started)

    def run(self, workload: str, *command: str, environment: Mapping[str, str] = MappingProxyType({})) -> str:
        """Run a command in another container of this workload's pod, with these variables, too. Returns its output."""
        words = self._flags(workload, 0, f"command-{self._number}")
        position = next(at for at, word in enumerate(words) if word.startswith("--entrypoint="))
        image = words[position + 1]
        self._number += 1
        return self.podman(
            "run", "--rm", f"--network={NETWORK}", *words[:position],
            *(f"--env={name}={value}" for name, value in environment.items()),
            f"--entrypoint={command[0]}", image, *command[1:],
        )  # fmt: skip

    def log(self, container: str) -> str:
        """The end of the log of a container."""
        return self.podman.log(container, 15)

    def message(self, container: str) -> str:
        """The termination message that the container left."""
        return (self._folder / container / "termination-log").read_text()

    def tell(self) -> str:
        """What every workload did, and the ends of the logs."""
        lines = [f"{name}: {one.ends} {one.pods}" for name, one in self.workloads.items()]
        logs = [f"== {pod}\n{self.log(pod)}" for pod in self._started]
        return "\n".join([*lines, *logs])

    def _start(self, name: str, index: int) -> None:
        workload = self.workloads[name]
        container = f"{name}-{index}-{self._number}"
        self._number += 1
        host = f"{name}-{index}"
        subdomain = workload.document["spec"]["template"]["spec"].get("subdomain")
        aliases = [*workload.names, *([f"{host}.{subdomain}"] if subdomain else [])]
        network = ",".join(f"alias={alias}" for alias in aliases)
        self.podman(
            "run", "--detach", f"--name={container}", f"--hostname={host[:63]}",
            f"--network={NETWORK}:{network}" if network else f"--network={NETWORK}",
            *self._flags(name, index, container),
        )  # fmt: skip
        workload.pods[index] = container
        self._started.append(container)

    def _flags(self, name: str, index: int, container: str) -> list[str]:
        template = self.workloads[name].document["spec"]["template"]
        return translation.flags(template, self._objects, self._folder / container, index=index, extra=self._extra)

    @staticmethod
    def _decide(workload: Workload, container: str, code: int) -> End:
        """What a controller does with this end of a pod."""
        if not workload.is_job:
            return "replaced"
        if code == 0:
            return "done"
        spec: dict[str, Any] = workload.document["spec"]
        for rule in spec["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {}).get("values", [])
            conditions = {one["type"] for one in rule.get("onPodConditions", [])}
            if code in codes or ("DisruptionTarget" in conditions and container in workload.evicted):
                return {"Ignore": "ignored", "FailJob": "failed"}[rule["action"]]  # type: ignore[return-value]
        workload.failures += 1
        limit = spec.get("backoffLimitPerIndex", spec.get("backoffLimit"))
        return "replaced" if workload.failures <= limit else "failed"
