"""The one shape of an error reply: {code, message, retryable}."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class HttpError(Exception):
    """An error reply: HTTP status, a code for programs and an error text for people."""

    def __init__(self, status: int, code: str, message: str, *, retryable: bool = False, **extra: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": "1"} if status in (429, 503) else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        self.body = {"code": code, "message": message, "retryable": retryable, **extra}


class ErrorReply(BaseModel):
    """The body of every error reply."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    code: str
    """Names the kind of error, for programs."""
    message: str
    """Says what was wrong and what to do, for people."""
    retryable: bool
    """Whether the same request may succeed later."""
