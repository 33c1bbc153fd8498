"""Requests and replies of the gateway's /v1 interface (docs/gateway.md describes the protocol)."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""Name of an environment. It is looked up in a registry and never joined to a path."""


class Wire(BaseModel):
    """Base class of requests and replies: immutable; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Status(StrEnum):
    """State of a session. The reward is null in `expired`, `cancelled` and `error`, because it is unknown."""

    RUNNING = "running"
    TERMINATED = "terminated"
    """The environment ended it."""
    TRUNCATED = "truncated"
    """The client (finalize) or a limit ended it before the environment did. The reward covers the steps up to there."""
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    ERROR = "error"

    @property
    def is_terminal(self) -> bool:
        """Whether no further step is possible."""
        return self is not Status.RUNNING


class ToolCall(Wire):
    """A tool call of the model."""

    id: str = ""
    name: str
    arguments: dict[str, Any]


class Message(Wire):
    """One message of the dialog, in the form that chat templates take."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class TextAction(Wire):
    """The unparsed text of the model. The gateway extracts the tool calls."""

    type: Literal["text"]
    text: str


class ToolCallsAction(Wire):
    """Tool calls that the client has parsed."""

    type: Literal["tool_calls"]
    calls: tuple[ToolCall, ...]


class MessageAction(Wire):
    """A message to the environment without tool calls."""

    type: Literal["message"]
    content: str


Action = Annotated[TextAction | ToolCallsAction | MessageAction, Field(discriminator="type")]


class CreateSession(Wire):
    """POST /v1/sessions"""

    environment: Name
    seed: int
    """Seed of the task. The same seed gives the same task."""
    group: str = ""
    attempt: int = 0


class Session(Wire):
    """A new session."""

    session_id: str
    lease_expires_in_s: float
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """JSON schemas in the form of the `tools` argument of chat templates."""
    next_step: int
    initial_state_hash: str
    """The same for all sessions of one task."""
    environment_version: str


def _no_truth_value(value: Any) -> Any:
    """Refuse true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a step is a number, not true or false")
    return value


class TakeStep(Wire):
    """POST /v1/sessions/{id}/step"""

    step: Annotated[int, Field(ge=0), BeforeValidator(_no_truth_value)]
    """`next_step` of the session. A repeat with the same number and action gets the stored reply."""
    action: Action


MAX_BATCH = 64
"""Maximum number of steps in one request."""


class BatchedStep(TakeStep):
    """A step of one session, in a request with steps of other sessions."""

    session_id: Annotated[str, Field(max_length=64)]


class TakeSteps(Wire):
    """POST /v1/steps"""

    steps: Annotated[tuple[BatchedStep, ...], Field(min_length=1, max_length=MAX_BATCH)]


class StepError(Wire):
    """Error that ended a session with status `error`, or the limit that truncated it (`limit_...`)."""

    code: str
    message: str


class Step(Wire):
    """Result of a step or of finalize."""

    step: int
    status: Status
    messages: tuple[Message, ...] = ()
    """Messages of the environment. Empty if the session ended."""
    reward: float | None = None
    """Reward in [0, 1], set once, when the session is terminated or truncated."""
    reward_parts: dict[str, float] = {}
    success: bool | None = None
    """Whether the task is solved. Independent of the reward."""
    error: StepError | None = None


class StepRefusal(Wire):
    """Why a step of a batch was not taken: the error that the same step alone would get."""

    model_config = ConfigDict(extra="ignore")

    code: str
    message: str
    retryable: bool


class StepOutcome(Wire):
    """One line of the reply to a batch: the outcome of one step; either `result` or `refusal` is set."""

    index: int
    """Position of the step in the request."""
    result: Step | None = None
    refusal: StepRefusal | None = None


class Lease(Wire):
    """Reply to a heartbeat."""

    lease_expires_in_s: float


class SessionState(Wire):
    """GET /v1/sessions/{id}"""

    session_id: str
    environment: str
    status: Status
    next_step: int
    lease_expires_in_s: float | None = None
    """Null if the session ended."""
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
    """Whether each session runs in a separate process."""
