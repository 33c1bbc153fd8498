"""Nodes without machines: a thread reports for every pod what its kubelet would report. No container runs.

A pod on a node is Running and ready at once, until the test ends it with an exit code. A pod that is deleted ends with
code 130, as our services do after SIGTERM.
"""

import datetime
import threading
from collections.abc import Callable

from tests.processes import waiting
from tests.servers.kubernetes_client import Kubernetes, Object, Refused

STOPPED = 130
LOOK_S = 0.2
Script = Callable[[Object], int | None]
"""Gets a pod that runs; returns the exit code with which its container ends now, or None."""


class FakeNodes:
    """Plays all nodes of a cluster inside the block `with`."""

    def __init__(self, client: Callable[[], Kubernetes], script: Script = lambda _pod: None) -> None:
        self._kubernetes, self._script, self._make_client = client(), script, client
        self._codes: dict[str, int] = {}
        self._paused = threading.Event()
        self._idle = threading.Event()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nodes")

    def __enter__(self) -> "FakeNodes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def add(self, name: str, *, labels: dict[str, str] | None = None, gpus: int = 64) -> None:
        """Add a node that is ready. It needs no heartbeat (`control_plane.running`)."""
        capacity = {
            "cpu": "256",
            "memory": "8Ti",
            "pods": "110",
            "ephemeral-storage": "1Ti",
            "nvidia.com/gpu": str(gpus),
        }
        conditions = [{"type": "Ready", "status": "True", "reason": "Test", "lastHeartbeatTime": _now()}]
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels or {}}}
        self._kubernetes.create(node)
        status = {"capacity": capacity, "allocatable": capacity, "conditions": conditions}
        self._kubernetes.patch("v1", "Node", name, {"status": status}, part="status")

    def end(self, pod: str, code: int) -> None:
        """End the container of a pod with this exit code."""
        self._codes[pod] = code

    def pause(self) -> None:
        """Report nothing until `resume`; a new pod stays pending."""
        self._idle.clear()
        self._paused.set()
        waiting.until(self._idle.is_set, "a pause of the nodes", tell=lambda: repr(self._failure))

    def resume(self) -> None:
        """Undo `pause`."""
        self._paused.clear()

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            kubernetes = self._make_client()
            while not self._ended.wait(LOOK_S):
                if self._paused.is_set():
                    self._idle.set()
                    continue
                nodes = {one["metadata"]["name"] for one in kubernetes.list("v1", "Node")}
                for pod in kubernetes.list("v1", "Pod"):
                    if pod["spec"].get("nodeName") in nodes:
                        self._report(kubernetes, pod)
        except BaseException as error:
            self._failure = error
            self._idle.set()
            raise

    def _report(self, kubernetes: Kubernetes, pod: Object) -> None:
        """Report one pod. Another client may change or delete it meanwhile."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        phase, deleted = pod["status"]["phase"], "deletionTimestamp" in pod["metadata"]
        try:
            if phase in ("Pending", "Running"):
                code = STOPPED if deleted else self._codes.get(name)
                if code is None and phase == "Running":
                    code = self._script(pod)
                if code is not None or phase == "Pending":
                    # the version: a condition that another client adds meanwhile must not be lost
                    version = {"resourceVersion": pod["metadata"]["resourceVersion"]}
                    change = {"metadata": version, "status": _status(pod, code)}
                    kubernetes.patch("v1", "Pod", name, change, namespace, "status")
            elif deleted:
                kubernetes.delete("v1", "Pod", name, namespace, grace_s=0)
        except Refused as refused:
            if refused.code not in (404, 409):
                raise


def _status(pod: Object, code: int | None) -> Object:
    """Status of a pod whose containers run (code None) or ended with the code."""
    state = {"running": {"startedAt": _now()}}
    if code is not None:
        state = {"terminated": {"exitCode": code, "startedAt": _now(), "finishedAt": _now()}}  # type: ignore[dict-item]
    containers = [
        {
            "name": one["name"],
            "image": one["image"],
            "imageID": "",
            "restartCount": 0,
            "ready": code is None,
            "state": state,
        }
        for one in pod["spec"]["containers"]
    ]
    kept = [one for one in pod["status"].get("conditions", []) if one["type"] not in ("Ready", "ContainersReady")]
    ready = "True" if code is None else "False"
    conditions = [*kept, {"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": ready}]
    phase = "Running" if code is None else "Failed" if code else "Succeeded"
    return {"phase": phase, "conditions": conditions, "containerStatuses": containers, "podIP": "10.0.0.1"}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
