"""Limits of a session at an OpenAI-compatible endpoint, against a real HTTP server."""

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from palimpsest.services.env_gateway.adapters import limited_endpoint
from palimpsest.services.env_gateway.adapters.limited_endpoint import EndpointFailed, EndpointLimits, LimitedEndpoint
from tests.processes.waiting import LIMIT_S
from tests.servers.chat_endpoint import Answer, ChatEndpoint, spoken

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}
BROKEN = Answer(b'{"error": "overloaded"}', status=500)
HANGING = Answer(hangs=True)
LONG_S = 600.0
"""A limit in seconds that no test reaches."""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_endpoint, "PAUSE_S", 0.0)


def scripted(*answers: Answer) -> ChatEndpoint:
    """Return an endpoint that gives these answers, then the last one for ever."""
    left = list(answers)
    return ChatEndpoint(lambda _: left.pop(0) if len(left) > 1 else left[0])


def session(
    endpoint: ChatEndpoint,
    *,
    requests: int = 64,
    tokens: int = 10**6,
    seconds: float = LONG_S,
    request_s: float = LONG_S,
) -> LimitedEndpoint:
    return LimitedEndpoint(endpoint.url, "secret", EndpointLimits(requests, tokens, seconds, request_s))


def test_a_reply_and_what_was_used() -> None:
    with scripted(spoken("Hi", usage=USAGE)) as endpoint:
        limited = session(endpoint)
        assert limited.complete(REQUEST)["choices"][0]["message"]["content"] == "Hi"
        assert (limited.requests, limited.tokens) == (1, 10)
        assert limited.seconds > 0.0
        assert endpoint.requests == [REQUEST]
        assert endpoint.tokens == ["Bearer secret"]


def test_each_retry_is_a_request() -> None:
    with scripted(BROKEN, BROKEN, spoken("Hi", usage=USAGE)) as endpoint:
        limited = session(endpoint, requests=4)
        limited.complete(REQUEST)
        assert (limited.requests, limited.tokens) == (3, 10)
        limited.complete(REQUEST)
        with pytest.raises(EndpointFailed, match=r"has made 4 requests to http://127.*, its limit$"):
            limited.complete(REQUEST)
        assert len(endpoint.requests) == 4


def test_the_limit_of_requests_ends_retries() -> None:
    with scripted(BROKEN) as endpoint:
        with pytest.raises(EndpointFailed, match=r"2 requests .* the last attempt: status 500: .*overloaded"):
            session(endpoint, requests=2).complete(REQUEST)
        assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("answer", "attempts", "reason"),
    [
        (BROKEN, 3, "status 500: .*overloaded"),
        (Answer(b"slow down", status=429), 3, "status 429: slow down"),
        (Answer(b"no such model", status=404), 1, "status 404: no such model"),
        (Answer(b"<html>"), 3, "no chat completion: <html>"),
        (Answer(b"[" * 10**5), 3, "no chat completion"),
        (Answer(b"[]"), 3, r"no chat completion: \[\]"),
        (Answer(b'{"choices": []}'), 3, "no chat completion"),
        (spoken(None, usage=USAGE), 3, "no chat completion"),
        (spoken("", usage=USAGE), 3, "no chat completion"),
        (Answer(spoken("", calls=(("f", {}),)).body.replace(b'"{}"', b'"{"')), 3, "no chat completion"),
        (Answer(b"x" * (limited_endpoint.REPLY_BYTES + 1)), 1, "longer than 4194304 bytes"),
    ],
)
def test_an_endpoint_without_a_usable_reply_fails_for_good(answer: Answer, attempts: int, reason: str) -> None:
    with scripted(answer) as endpoint:
        limited = session(endpoint, tokens=10**8)
        for _ in range(2):
            with pytest.raises(EndpointFailed, match=f"no usable reply in {attempts} attempts: .*{reason}"):
                limited.complete(REQUEST)
        assert len(endpoint.requests) == attempts


def test_a_refused_connection() -> None:
    with scripted(BROKEN) as endpoint:
        limited = session(endpoint)
    with pytest.raises(EndpointFailed, match="in 3 attempts: ConnectError"):
        limited.complete(REQUEST)
    assert limited.requests == 3


def test_a_reply_that_trickles_for_ever_ends_with_the_limit_of_a_request() -> None:
    with scripted(HANGING, spoken("Hi", usage=USAGE)) as endpoint:
        limited = session(endpoint, request_s=0.5)
        assert limited.complete(REQUEST)["choices"]
        assert limited.requests >= 2  # a busy machine may take longer than 0.5 s for the second, too
        assert limited.seconds >= 0.5


def test_the_limit_of_seconds_is_that_of_the_session() -> None:
    with scripted(HANGING) as endpoint:
        limited = session(endpoint, seconds=0.5, request_s=LONG_S)
        with pytest.raises(EndpointFailed, match=r"has spent 0.5 s at http.*its limit; the last attempt: no complete"):
            limited.complete(REQUEST)
        assert limited.requests == 1


def test_a_lookup_of_the_host_that_hangs_ends_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    released, ended = threading.Event(), threading.Event()

    def hanging(*_: object, **__: object) -> None:
        released.wait(LIMIT_S)
        ended.set()
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    limits = EndpointLimits(64, 10**6, 0.5, LONG_S)
    try:
        with pytest.raises(EndpointFailed, match=r"has spent 0.5 s at http://user.example"):
            LimitedEndpoint("http://user.example/v1", "", limits).complete(REQUEST)
        assert not ended.is_set(), "the call waited for the lookup"
    finally:
        released.set()


def test_seconds_add_up_over_calls() -> None:
    with scripted(spoken("Hi", usage=USAGE)) as endpoint:
        limited = session(endpoint)
        limited.complete(REQUEST)
        first = limited.seconds
        limited.complete(REQUEST)
        assert limited.seconds > first
        limited._limits = EndpointLimits(64, 10**6, limited.seconds, LONG_S)
        with pytest.raises(EndpointFailed, match=r"s at http.*, its limit$"):
            limited.complete(REQUEST)
        assert len(endpoint.requests) == 2


def test_tokens_over_the_limit_refuse_the_reply() -> None:
    with scripted(spoken("Hi", usage=USAGE)) as endpoint:
        limited = session(endpoint, tokens=20)
        limited.complete(REQUEST)
        limited.complete(REQUEST)
        with pytest.raises(EndpointFailed, match=r"has used 30 tokens at .*, more than its limit 20"):
            limited.complete(REQUEST)
        with pytest.raises(EndpointFailed, match="30 tokens"):
            limited.complete(REQUEST)
        assert len(endpoint.requests) == 3


def edited(change: Callable[[dict[str, Any]], object]) -> Answer:
    reply = json.loads(spoken("Hi", usage=dict(USAGE)).body)
    change(reply)
    return Answer(json.dumps(reply).encode())


@pytest.mark.parametrize(
    "answer",
    [
        spoken("Hi"),
        edited(lambda reply: reply.update(usage=None)),
        edited(lambda reply: reply.update(usage=[1])),
        edited(lambda reply: reply["usage"].pop("prompt_tokens")),
        edited(lambda reply: reply["usage"].update(completion_tokens="3")),
        edited(lambda reply: reply["usage"].update(prompt_tokens=-7)),
        edited(lambda reply: reply.update(usage={"prompt_tokens": 0, "completion_tokens": 0})),
    ],
)
def test_without_usage_each_byte_counts_as_a_token(answer: Answer) -> None:
    size = len(json.dumps(REQUEST).encode()) + len(answer.body)
    with scripted(answer) as endpoint:
        limited = session(endpoint, tokens=size)
        limited.complete(REQUEST)
        assert limited.tokens == size
        with pytest.raises(EndpointFailed, match=f"{2 * size} tokens"):
            limited.complete(REQUEST)


def test_a_wrong_reply_that_was_paid_counts_its_tokens() -> None:
    with scripted(spoken("", usage=USAGE), spoken("Hi", usage=USAGE)) as endpoint:
        limited = session(endpoint)
        limited.complete(REQUEST)
        assert limited.tokens == 20
