"""Checks of the run's model. Pure."""

from __future__ import annotations

from palimpsest.doctor.facts import Facts
from palimpsest.doctor.findings import STOPS, WARNS, Finding

CHECK = "Chat template"


def chat_template(facts: Facts) -> list[Finding]:
    """Return the finding about the chat template; empty if no run was named."""
    proof = facts.template
    if proof is None:
        return []
    if proof.unproven:
        return [Finding(CHECK, f"not checked: {proof.unproven}")]
    if proof.refused:
        what, _, remedy = proof.refused.partition(". ")
        return [Finding(CHECK, what, STOPS, "A worker refuses the model at its start.", remedy)]
    own = f"model.chat_template = {proof.chosen}" if proof.chosen else "its own"
    value = f"{proof.model}: {own}, renders tools, answers and prompts; a message ends with {' or '.join(proof.ends)}"
    if proof.refuses_system:
        return [
            Finding(
                CHECK,
                f"{proof.model}: {own}, refuses system messages ({proof.refuses_system})",
                WARNS,
                "An environment that begins with a system message loses its trajectories.",
                'Set model.chat_template = "tools", or to the file of a template that renders them.',
            )
        ]
    return [Finding(CHECK, value)]
