"""A small client of the API server: objects are dictionaries, as in YAML."""

from collections.abc import Iterable
from typing import Any

import httpx

Object = dict[str, Any]
MERGE = {"content-type": "application/merge-patch+json"}
SYSTEM = {"events", "endpoints", "endpointslices", "leases", "podtemplates", "controllerrevisions"}
"""Resources that controllers write for others and remove by themselves."""


class Refused(Exception):
    """The API server refused a request. `code` is the HTTP status."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(reply.json().get("message", reply.text))
        self.code = reply.status_code


class Kubernetes:
    """Reads and writes objects by kind. One for each thread."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._resources: dict[tuple[str, str], tuple[str, bool]] = {}

    def create(self, document: Object, namespace: str = "", *, dry: bool = False) -> Object:
        """Create an object; an unknown or repeated field is an error. dry: only check it."""
        path = self._path(document["apiVersion"], document["kind"], namespace)
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry else {})}
        return self._sent("POST", path, params=query, json=document)

    def get(self, version: str, kind: str, name: str, namespace: str = "") -> Object | None:
        """Return an object, or None if there is none."""
        try:
            return self._sent("GET", self._path(version, kind, namespace, name))
        except Refused as refused:
            if refused.code == 404:
                return None
            raise

    def list(self, version: str, kind: str, namespace: str = "", labels: str = "") -> list[Object]:
        """Return the objects of a kind with these labels, in a namespace or in all."""
        query = {"labelSelector": labels} if labels else {}
        return list(self._sent("GET", self._path(version, kind, namespace), params=query)["items"])

    def patch(self, version: str, kind: str, name: str, change: Object, namespace: str = "", part: str = "") -> Object:
        """Merge a change into an object, or into its part: `status`, `scale`."""
        path = self._path(version, kind, namespace, name) + (f"/{part}" if part else "")
        return self._sent("PATCH", path, json=change, headers=MERGE)

    def delete(self, version: str, kind: str, name: str, namespace: str = "", grace_s: int | None = None) -> None:
        """Delete an object. grace_s 0: at once, as a kubelet does after the containers ended."""
        query: Object = {"propagationPolicy": "Background"}  # without it, the pods of a Job stay
        if grace_s is not None:
            query["gracePeriodSeconds"] = grace_s
        self._sent("DELETE", self._path(version, kind, namespace, name), params=query)

    def evict(self, pod: str, namespace: str) -> None:
        """Ask for the eviction of a pod, as a node drain does. Raises Refused with code 429 if a budget forbids it."""
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
        self._sent("POST", self._path("v1", "Pod", namespace, pod) + "/eviction", json=body)

    def names(self, namespace: str) -> set[str]:
        """Return `kind/name` of everything in a namespace, of every kind that the server knows."""
        found = set()
        for version in self._versions():
            for one in self._sent("GET", _root(version))["resources"]:
                name = one["name"]
                if not one["namespaced"] or "list" not in one["verbs"] or "/" in name or name in SYSTEM:
                    continue
                found |= {
                    f"{one['kind']}/{item['metadata']['name']}" for item in self.list(version, one["kind"], namespace)
                }
        return found

    def _versions(self) -> Iterable[str]:
        yield "v1"
        for group in self._sent("GET", "/apis")["groups"]:
            yield group["preferredVersion"]["groupVersion"]

    def _path(self, version: str, kind: str, namespace: str, name: str = "") -> str:
        if (version, kind) not in self._resources:
            for one in self._sent("GET", _root(version))["resources"]:
                if "/" not in one["name"]:
                    self._resources[version, one["kind"]] = one["name"], one["namespaced"]
        plural, namespaced = self._resources[version, kind]
        scope = f"/namespaces/{namespace}" if namespaced and namespace else ""
        return f"{_root(version)}{scope}/{plural}" + (f"/{name}" if name else "")

    def _sent(self, method: str, path: str, **arguments: Any) -> Object:
        reply = self._http.request(method, path, **arguments)
        if reply.is_error:
            raise Refused(reply)
        content: Object = reply.json()
        return content


def condition(document: Object | None, kind: str) -> Object:
    """Return a condition of an object that is true, or an empty dictionary."""
    conditions: list[Object] = (document or {}).get("status", {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), {})


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"
