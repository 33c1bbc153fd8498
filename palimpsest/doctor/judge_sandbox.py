"""Check of the program that code tools need. Pure."""

from __future__ import annotations

from palimpsest.doctor.facts import Facts
from palimpsest.doctor.findings import STOPS, Finding


def sandbox(facts: Facts) -> list[Finding]:
    """Return the finding about a missing bubblewrap; empty if it is there or not needed."""
    if not facts.bubblewrap_missing:
        return []
    return [
        Finding(
            "Code tools", "bwrap is not on the PATH", STOPS,
            'The gateway refuses env_gateway.code_tools = "bubblewrap".',
            "Install bubblewrap (Debian and Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap).",
        )
    ]  # fmt: skip
