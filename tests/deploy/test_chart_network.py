"""The network policies permit the connections that the services need, and no others."""

from collections.abc import Callable

import pytest

from tests.deploy.conftest import VALUES, Document, Rendered

pytestmark = pytest.mark.thorough
STORE, GATEWAY, LEARNER, RANDOM = 7701, 7702, 7704, 40123
PORTS = (STORE, GATEWAY, LEARNER, RANDOM)
PERMITTED = {
    ("rollout", "gateway", GATEWAY),
    ("rollout", "store", STORE),
    ("learner", "store", STORE),
    *(("learner", "learner", port) for port in PORTS),
    ("replica", "store", STORE),
    ("test", "gateway", GATEWAY),
    ("test", "store", STORE),
}


def pods(rendered: Rendered) -> dict[str, Document]:
    """Labels of a pod of each component."""
    found = {}
    for pod in rendered.pods.values():
        found[pod["metadata"]["labels"]["app.kubernetes.io/component"]] = pod["metadata"]["labels"]
    return found


def selected(selector: Document, labels: Document) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def permits(rules: list[Document], side: str, peer: Document | None, port: int) -> bool:
    """Whether a rule permits the port to this peer; None is an address outside the cluster."""
    for rule in rules:
        peers = rule.get(side)
        of_peer = not peers or any(
            ("ipBlock" in one) if peer is None else ("podSelector" in one and selected(one["podSelector"], peer))
            for one in peers
        )
        if of_peer and ("ports" not in rule or port in {one["port"] for one in rule["ports"]}):
            return True
    return False


def allowed(rendered: Rendered, pod: Document, direction: str, side: str, peer: Document | None, port: int) -> bool:
    """Whether the policies of a pod permit one direction. A pod without a policy permits everything."""
    own = [one["spec"] for one in rendered.of("NetworkPolicy").values() if selected(one["spec"]["podSelector"], pod)]
    return not own or permits([rule for one in own for rule in one.get(direction) or []], side, peer, port)


def reaches(rendered: Rendered, source: Document, target: Document | None, port: int) -> bool:
    """Whether a pod reaches another pod, or an address outside the cluster (None), at a port."""
    if not allowed(rendered, source, "egress", "to", target, port):
        return False
    return target is None or allowed(rendered, target, "ingress", "from", source, port)


@pytest.mark.parametrize("values", VALUES)
def test_only_the_listed_connections_are_permitted(values: str, render: Callable[..., Rendered]) -> None:
    rendered = render(values)
    known = pods(rendered)
    found = {
        (source, target, port)
        for source, own in known.items()
        for target, other in known.items()
        for port in PORTS
        if reaches(rendered, own, other, port)
    }
    assert found == {one for one in PERMITTED if {one[0], one[1]} <= known.keys()}


def test_the_gateway_reaches_neither_the_log_nor_the_store(render: Callable[..., Rendered]) -> None:
    """Environments are third-party code."""
    rendered = render("external")
    known = pods(rendered)
    for port in (9094, 9095, 9443, 443, 80):
        assert not reaches(rendered, known["gateway"], None, port)
    assert not reaches(rendered, known["gateway"], known["store"], STORE)
    assert reaches(rendered, known["gateway"], None, 53)


def test_a_rule_of_the_values_opens_the_gateway(render: Callable[..., Rendered]) -> None:
    rendered = render("external", "--set-json", 'gateway.egress=[{"ports":[{"protocol":"TCP","port":443}]}]')
    assert reaches(rendered, pods(rendered)["gateway"], None, 443)


def test_log_and_object_store_are_reached_at_their_ports_only(render: Callable[..., Rendered]) -> None:
    rendered = render("external")
    known = pods(rendered)
    outside = {name: {p for p in (9094, 9095, 9443, 443) if reaches(rendered, known[name], None, p)} for name in known}
    assert outside == {
        "learner": {9094, 9095, 9443},
        "rollout": {9094, 9095, 9443},
        "store": {9443},
        "gateway": set(),
        "test": set(),
    }


@pytest.mark.parametrize(("endpoint", "port"), [("https://s3.example", 443), ("http://s3.example", 80)])
def test_the_port_of_the_object_store_follows_from_its_scheme(
    endpoint: str, port: int, render: Callable[..., Rendered]
) -> None:
    rendered = render("external", "--set", f"objectStore.endpoint={endpoint}")
    assert [p for p in (80, 443) if reaches(rendered, pods(rendered)["store"], None, p)] == [port]


def test_without_the_policies_the_gateway_reaches_the_store(render: Callable[..., Rendered]) -> None:
    """The check of this file notices missing policies."""
    rendered = render("external", "--set", "networkPolicy.enabled=false")
    known = pods(rendered)
    assert reaches(rendered, known["gateway"], known["store"], STORE)
    assert reaches(rendered, known["gateway"], None, 9094)
