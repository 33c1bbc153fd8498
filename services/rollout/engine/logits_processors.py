"""Installed plug-ins that change the engine's logits."""

from importlib.metadata import entry_points

from palimpsest.common.user_error import UserError

GROUP = "vllm.logits_processors"
"""Entry points that vLLM loads into its sampler without an option."""


def refuse_logits_processors() -> None:
    """Raise UserError if an installed package would change the distribution that the engine samples from."""
    if found := sorted(f"{entry.name} ({entry.value})" for entry in entry_points(group=GROUP)):
        raise UserError(
            f"installed packages add logits processors to vLLM: {', '.join(found)}. They change the distribution that "
            f"the engine samples from, and the learner cannot reproduce it. Uninstall these packages"
        )
