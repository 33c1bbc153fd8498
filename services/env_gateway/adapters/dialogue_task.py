"""What tau2-bench and VitaBench share: an orchestrator of dialogues takes turns between the model, a user and tools.

The model's messages come from outside, so the orchestrator runs until the model must speak, and stops there.
"""

from typing import Any

from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.port import Message, Outcome, Reply, Score, Turn
from palimpsest.services.env_gateway.adapters.adapter import AdapterEnvironment

STEPS = 10_000
"""Limit of an orchestrator, which never applies: the limits of a trajectory do."""


class QueuedAgent:
    """Base class, before the package's own, of an agent whose next message is put into it."""

    next_message: Any = None

    @property
    def is_empty(self) -> bool:
        """Whether the model must speak."""
        return self.next_message is None

    def generate_next_message(self, message: Any, state: Any) -> Any:
        """Return the message that was put, with the unchanged state."""
        message, self.next_message = self.next_message, None
        return message, state

    def get_init_state(self, message_history: Any = None) -> Any:
        """Return an empty state: the trainer keeps the history."""
        return {}

    def set_seed(self, seed: int) -> None:
        """Ignore the seed: the model samples outside."""


class DialogueTask(AdapterEnvironment):
    """See port.py. Base class; `reset` of a subclass sets the task, the agent and the orchestrator."""

    _task: Any
    _agent: Any
    _orchestrator: Any
    _turns = 0

    def step(self, turn: Turn) -> Outcome:
        calls = [
            {"id": f"call_{self._turns}_{i}", "name": c.name, "arguments": c.arguments}
            for i, c in enumerate(turn.calls)
        ]
        if turn.attempts and not calls:
            return Reply(())  # only malformed calls, which the gateway answers
        self._turns += 1
        before = len(self._orchestrator.trajectory)
        self._put(turn.text, calls)
        self._until_the_agent()
        if self._orchestrator.done:
            return self._score()
        # The model's own message is in the trajectory too.
        new = [one for one in self._orchestrator.trajectory[before:] if one.role != "assistant" and is_heard(one)]
        errors = sum(bool(getattr(one, "error", False)) for one in new)
        return Reply(tuple(spoken(one) for one in new), errors)

    def state_hash(self) -> str:
        return hash_of(self._task.id, self._turns)

    def _begin(self) -> list[Message]:
        """Run the dialogue until the model must speak. Return the messages that it hears."""
        self._orchestrator.initialize()
        self._until_the_agent()
        if self._orchestrator.done:
            raise RuntimeError("the user ended the dialogue before its beginning")
        return [spoken(one) for one in self._orchestrator.trajectory if is_heard(one)]

    def _put(self, text: str, calls: list[dict[str, Any]]) -> None:
        """Set the model's message. calls: each with `id`, `name` and `arguments`."""
        self._agent.put(text=text, calls=calls)

    def _until_the_agent(self) -> None:
        """Take steps of the orchestrator until the model must speak or the task is over."""
        while not self._orchestrator.done and not (
            self._orchestrator.to_role.value == "agent" and self._agent.is_empty
        ):
            self._advance()

    def _advance(self) -> None:
        """Take one step of the orchestrator."""
        self._orchestrator.step()

    def _score(self) -> Score:
        """Return the score of the ended dialogue."""
        raise NotImplementedError


def is_heard(message: Any) -> bool:
    """Whether the model hears this message: not what the user does with tools of its own."""
    if message.role == "tool":
        return bool(message.requestor == "assistant")
    return not message.is_tool_call() and message.role in ("assistant", "user")


def spoken(message: Any) -> Message:
    """Return a message of the package as a message of a session."""
    return Message(role=message.role, content=message.content or "")
