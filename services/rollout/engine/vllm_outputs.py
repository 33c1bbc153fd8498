"""Tokens, log-probs and version spans in vLLM's outputs."""

from typing import Any

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
    )


def _version(label: str) -> Version:
    """Return the version of a span; -1 for tokens sampled before the first update."""
    return Version(int(label)) if label.isdigit() else Version(-1)
