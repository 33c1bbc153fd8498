"""Requests and replies of the gateway's /v1 interface (../docs/gateway.md has the whole protocol)."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""Names of environments and splits: looked up in a registry, never joined to a path."""


class Wire(BaseModel):
    """What passes between client and gateway: frozen, and it takes no field it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Status(StrEnum):
    """Where a session stands. Reward is null in `expired`, `cancelled` and `error`: unknown is not 0."""

    RUNNING = "running"
    TERMINATED = "terminated"
    """The environment ended it."""
    TRUNCATED = "truncated"
    """The client ended it before the environment did (finalize); the reward is for what there was."""
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    ERROR = "error"

    @property
    def is_terminal(self) -> bool:
        """Whether no further step is possible."""
        return self is not Status.RUNNING


class ToolCall(Wire):
    """The model asks for a tool."""

    id: str = ""
    name: str
    arguments: dict[str, Any]


class Message(Wire):
    """One message of the dialogue, in the shape chat templates take."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class TextAction(Wire):
    """What the model wrote, as it stands: the gateway finds the tool calls in it."""

    type: Literal["text"] = "text"
    text: str


class ToolCallsAction(Wire):
    """Tool calls already parsed by the client."""

    type: Literal["tool_calls"]
    calls: tuple[ToolCall, ...]


class MessageAction(Wire):
    """A plain message to the environment, without tool calls."""

    type: Literal["message"]
    content: str


Action = Annotated[TextAction | ToolCallsAction | MessageAction, Field(discriminator="type")]


class CreateSession(Wire):
    """POST /v1/sessions"""

    environment: Name
    seed: int
    """The task: the same seed is the same task."""
    group: str = ""
    attempt: int = 0


class Session(Wire):
    """A session has begun."""

    session_id: str
    lease_expires_in_s: float
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """JSON schemas in the shape of the `tools` argument of chat templates."""
    next_step: int
    initial_state_hash: str
    """Equal for all sessions of one task."""
    environment_version: str


class TakeStep(Wire):
    """POST /v1/sessions/{id}/step"""

    step: Annotated[int, Field(ge=0)]
    """The session's next_step. The same number with the same action again gives the stored reply."""
    action: Action


class StepError(Wire):
    """Why a session ended as `error`."""

    code: str
    message: str


class Step(Wire):
    """What came of a step, of finalize, or of asking for the session."""

    step: int
    status: Status
    messages: tuple[Message, ...] = ()
    """What the environment says; empty when it ended."""
    reward: float | None = None
    """Set once, when terminated or truncated; in [0, 1]."""
    reward_parts: dict[str, float] = {}
    success: bool | None = None
    """Whether the task is solved, apart from the reward."""
    error: StepError | None = None


class Lease(Wire):
    """The answer to a heartbeat."""

    lease_expires_in_s: float


class SessionState(Wire):
    """GET /v1/sessions/{id}"""

    session_id: str
    environment: str
    status: Status
    next_step: int
    lease_expires_in_s: float | None = None
    """Null when it has ended."""
    reward: float | None = None
    reward_parts: dict[str, float] = {}
    success: bool | None = None
    error: StepError | None = None


class EnvironmentInfo(Wire):
    """GET /v1/envs/{name}, and each item of GET /v1/envs"""

    name: str
    version: str
    description: str
    isolated: bool
    """Whether each session has a process of its own."""
