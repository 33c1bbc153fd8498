"""The endpoints that an adapter's settings name: the model of the simulated user, and the model that judges."""

import os

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable
from palimpsest.services.env_gateway.adapters.limited_endpoint import EndpointLimits, LimitedEndpoint


def user_endpoint(settings: AdapterConfig) -> LimitedEndpoint:
    """Return a session's access to the user's model. Raises AdapterUnusable if the settings name none."""
    if not settings.url or not settings.user_model:
        raise AdapterUnusable(f"the simulated user of {settings.kind} needs the keys `url` and `user_model`")
    limits = EndpointLimits(
        requests=settings.user_calls,
        tokens=settings.user_tokens,
        seconds=settings.user_session_s,
        request_s=settings.user_limit_s,
    )
    return LimitedEndpoint(settings.url, _token(settings.token_variable), limits)


def judge_endpoint(settings: AdapterConfig) -> LimitedEndpoint:
    """Return a session's access to the judge's model. Raises AdapterUnusable if the settings name none."""
    if not settings.judge_url or not settings.judge_model:
        raise AdapterUnusable(f"the judge of {settings.kind} needs the keys `judge_url` and `judge_model`")
    limits = EndpointLimits(
        requests=settings.judge_calls,
        tokens=settings.judge_tokens,
        seconds=settings.judge_session_s,
        request_s=settings.judge_limit_s,
    )
    return LimitedEndpoint(settings.judge_url, _token(settings.judge_token_variable), limits)


def _token(variable: str) -> str:
    return os.environ.get(variable, "") if variable else ""
