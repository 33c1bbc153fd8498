"""Translates a pod of the chart into `podman run`, as a kubelet carries it out. Every field must be known here.

`podman kube play` of Debian 12 knows neither Jobs nor StatefulSets, and ignores fields that it does not know.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

Document = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
NO_EFFECT = {
    *("serviceAccountName", "automountServiceAccountToken", "enableServiceLinks", "restartPolicy"),
    *("containers", "volumes", "securityContext", "terminationGracePeriodSeconds", "subdomain"),
}
"""Fields of a pod that need no flag, or that other parts of this module read."""
OF_A_CONTAINER = {
    *("name", "image", "imagePullPolicy", "command", "args", "env", "ports", "startupProbe", "livenessProbe"),
    *("readinessProbe", "securityContext", "resources", "volumeMounts", "terminationMessagePolicy"),
}
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Objects:
    """What the pods refer to: the rest of the release, and what exists beside it."""

    config_maps: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, Mapping[str, str]]
    claims: Mapping[str, Path]
    """Folders of the PersistentVolumeClaims."""


def flags(
    pod: Document, objects: Objects, folder: Path, *, index: int = 0, extra: Mapping[Path, str] = MappingProxyType({})
) -> list[str]:
    """Return flags, image and command of the pod's container, without its name and network.

    folder: where the pod's own files lie, made here. extra: more folders of this machine, mounted read-only.
    """
    spec = pod["spec"]
    (container,) = spec["containers"]
    _know(spec, NO_EFFECT)
    _know(container, OF_A_CONTAINER)
    folder.mkdir()
    message = folder / "termination-log"
    message.touch()
    message.chmod(0o666)
    found = [
        *_security(spec["securityContext"], container["securityContext"]),
        f"--stop-timeout={spec['terminationGracePeriodSeconds']}",
        *_resources(container["resources"]),
        f"--volume={message}:/dev/termination-log",
        *(f"--env={name}={value}" for name, value in _environment(container["env"], objects, index).items()),
    ]
    volumes = {one["name"]: one for one in spec["volumes"]}
    group = spec["securityContext"]["fsGroup"]
    found += [_mount(one, volumes.get(one["name"], {}), objects, folder, group) for one in container["volumeMounts"]]
    found += [f"--volume={source}:{target}:ro" for source, target in extra.items()]
    command = list(container.get("command", []))
    entrypoint = [f"--entrypoint={command.pop(0)}"] if command else []
    return [*found, *entrypoint, container["image"], *command, *container.get("args", [])]


def _know(section: Document, known: set[str]) -> None:
    assert section.keys() <= known, f"translate {sorted(section.keys() - known)}, too"


def _security(pod: Document, container: Document) -> list[str]:
    _know(pod, {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile"})
    _know(container, {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"})
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}  # Podman's default
    assert (container["allowPrivilegeEscalation"], container["capabilities"]) == (False, {"drop": ["ALL"]})
    assert container["readOnlyRootFilesystem"]
    return [
        f"--user={pod['runAsUser']}:{pod['runAsGroup']}",
        f"--group-add={pod['fsGroup']}",
        *("--security-opt=no-new-privileges", "--cap-drop=ALL", "--read-only", "--read-only-tmpfs=false"),
    ]


def _resources(resources: Document) -> list[str]:
    """Memory limits; requests and GPUs are the scheduler's."""
    limits = resources["limits"]
    _know(limits, {"memory"})
    memory = int(limits["memory"][:-2]) * UNITS[limits["memory"][-2:]]
    return [f"--memory={min(memory, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"]


def _environment(variables: Sequence[Document], objects: Objects, index: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in variables:
        source = one.get("valueFrom", {})
        if "secretKeyRef" in source:
            found[one["name"]] = objects.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
        elif "fieldRef" in source:
            assert source["fieldRef"] == {"fieldPath": f"metadata.annotations['{INDEX}']"}
            found[one["name"]] = str(index)
        else:
            value = one.get("value", "")
            for name, known in found.items():
                value = value.replace(f"$({name})", known)
            found[one["name"]] = value
    return found


def _mount(mount: Document, volume: Document, objects: Objects, folder: Path, group: int) -> str:
    """Prepare a volume as a kubelet does for this fsGroup, and return the flag that mounts it."""
    _know(mount, {"name", "mountPath", "readOnly"})
    mode = "ro" if mount.get("readOnly") else "rw"
    path = folder / mount["name"]
    if volume.get("emptyDir", {}).get("medium") == "Memory":
        size = volume["emptyDir"]["sizeLimit"]
        assert mount["mountPath"] == "/dev/shm"
        return f"--shm-size={int(size[:-2]) * UNITS[size[-2:]]}"
    if "configMap" in volume or "secret" in volume:
        if "configMap" in volume:
            content = objects.config_maps[volume["configMap"]["name"]]
        else:
            stored = objects.secrets[volume["secret"]["secretName"]]
            content = {one["path"]: stored[one["key"]] for one in volume["secret"]["items"]}
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
            _own(path / name, group, 0o440)
    elif "emptyDir" in volume:
        path.mkdir()
    else:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName", mount["name"])
        path = objects.claims[claim]
    if mode == "rw":
        _own(path, group, 0o2775)
    return f"--volume={path}:{mount['mountPath']}:{mode}"


def _own(path: Path, group: int, mode: int) -> None:
    os.chown(path, 0, group)
    path.chmod(mode)
