"""Tokens, log-probs and version spans in vLLM's outputs."""

from typing import Any

from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout.engine.port import SampledTokens, Span


def to_sampled_tokens(request_output: Any) -> SampledTokens:
    """Return the tokens of a RequestOutput."""
    output = request_output.outputs[0]
    tokens = tuple(output.token_ids)
    return SampledTokens(
        tokens,
        tuple(by_token[token].logprob for token, by_token in zip(tokens, output.logprobs, strict=True)),
        tuple(Span(_version(span.version), span.start, span.end) for span in output.weight_versions or ()),
        stopped=output.finish_reason == "stop",
        routes=output.routed_experts,
    )


def _version(label: str) -> Version:
    """Return the version of a span; -1 for tokens sampled before the first update."""
    return Version(int(label)) if label.isdigit() else Version(-1)


def refuse_routes_of_cpu() -> None:
    """Raise UserError: vLLM's CPU engine does not return the experts that it chose."""
    raise UserError(
        "learner.routing_replay is engine, but vLLM's CPU engine does not return the experts that it chose (its model "
        "runner for them needs Triton): use a GPU, or set learner.routing_replay to another value"
    )
