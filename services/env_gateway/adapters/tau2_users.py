"""The two sides of a dialogue of tau2-bench: the model, whose messages come from outside, and the user.

The scripted user tells its whole scenario at once. Of its own actions that the task expects, it takes the next one that
the model's text names, in words or as its tools spell it. It answers any other text with one confirmation, the next
such text with the end. It is deterministic. It takes no action unasked, because a task that expects actions of the
user alone, as many of telecom do, would else pay a model that does nothing.
"""

import importlib
import re
from typing import Any

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.services.env_gateway.adapters.dialogue_task import QueuedAgent
from palimpsest.services.env_gateway.adapters.model_endpoints import user_endpoint

STOP = "###STOP###"
START = "Solve the ticket with your tools. Call `done` at the end."
CONFIRM = "Yes, please go ahead. I have nothing to add."
SENT = ("messages", "tools", "tool_choice", "temperature", "seed")
"""What a request of tau2-bench passes to the endpoint."""


def queued_agent(environment: Any, task: Any, *, solo: bool) -> Any:
    """Return an agent of tau2-bench whose next message is put into it."""
    base = importlib.import_module("tau2.agent.llm_agent")
    messages = importlib.import_module("tau2.data_model.message")
    tools = environment.get_tools()
    if solo:
        tools = tools + environment.get_user_tools()
        official = base.LLMSoloAgent(tools=tools, domain_policy=environment.get_policy(), task=task, llm="none")
    else:
        official = base.LLMAgent(tools=tools, domain_policy=environment.get_policy(), llm="none")

    class GymAgent(QueuedAgent, base.LLMAgent):  # type: ignore[misc, name-defined]
        """The name is that of the one agent besides its own which tau2-bench permits in solo mode."""

        def __init__(self) -> None:
            super().__init__(tools=official.tools, domain_policy=official.domain_policy, llm="none")

        system_prompt = official.system_prompt

        def put(self, *, text: str, calls: list[dict[str, Any]]) -> None:
            """Set the next message. tau2-bench allows either a text or calls; a text beside calls is left out."""
            if solo and any(call["name"] == "done" for call in calls):
                text, calls = STOP, []
            made = [messages.ToolCall(**call, requestor="assistant") for call in calls] or None
            content = None if calls else text or None
            self.next_message = messages.AssistantMessage(role="assistant", content=content, tool_calls=made)

        @classmethod
        def is_stop(cls, message: Any) -> bool:
            """The model ends a task only in solo mode: in a dialogue the user does."""
            return solo and message.content is not None and STOP in message.content

    return GymAgent()


def make(settings: AdapterConfig, environment: Any, task: Any) -> Any:
    """Return the user that the settings name. Raises AdapterUnusable if they lack a key."""
    module = importlib.import_module("tau2.user.user_simulator")
    if settings.user == "none":
        return module.DummyUser()
    try:
        tools = environment.get_user_tools(include=task.user_tools) or None
    except ValueError:  # a domain whose user has no tools
        tools = None
    if settings.user == "scripted":
        return _scripted(module, task, tools)
    return _simulated(module, settings, task, tools)


def names(text: str, tool: str) -> bool:
    """Return whether the text names this tool, as `toggle_data` or as "toggle data".

    >>> names("Please toggle Data.", "toggle_data"), names("Please toggle data saver mode.", "toggle_wifi")
    (True, False)
    """
    spaced = re.sub(r"[\W_]+", " ", f" {text} ").lower()
    return f" {tool.replace('_', ' ').lower()} " in spaced


def _scripted(module: Any, task: Any, tools: Any) -> Any:
    messages = importlib.import_module("tau2.data_model.message")
    expected = task.evaluation_criteria.actions or [] if task.evaluation_criteria is not None else []
    own = [action for action in expected if action.requestor == "user"]

    class ScriptedUser(module.UserSimulator):  # type: ignore[misc]
        """See the module."""

        def __init__(self) -> None:
            super().__init__(llm="none", instructions=str(task.user_scenario), tools=tools)
            self._spoken = 0
            """Texts since the beginning or the last action."""
            self._actions = list(own)

        def set_seed(self, seed: int) -> None: ...

        def _generate_next_message(self, message: Any, state: Any) -> Any:
            if getattr(message, "role", "") == "tool":
                return messages.UserMessage(role="user", content=f"I did that. It says: {message.content}")
            self._spoken += 1
            if self._spoken == 1:
                return messages.UserMessage(role="user", content=self.instructions)
            if action := next((one for one in self._actions if names(message.content or "", one.name)), None):
                self._actions.remove(action)
                made = messages.ToolCall(
                    id=action.action_id, name=action.name, arguments=action.arguments, requestor="user"
                )
                self._spoken = 1
                return messages.UserMessage(role="user", content=None, tool_calls=[made])
            return messages.UserMessage(role="user", content=CONFIRM if self._spoken == 2 else STOP)

    return ScriptedUser()


def _simulated(module: Any, settings: AdapterConfig, task: Any, tools: Any) -> Any:
    """Return tau2-bench's own simulator on an endpoint with limits. The same model judges assertions."""
    endpoint = user_endpoint(settings)
    answers = importlib.import_module("litellm").ModelResponse

    def completion(**arguments: Any) -> Any:
        """Take the place of litellm's function of this name in tau2-bench, so that all its calls are counted."""
        sent = {key: arguments[key] for key in SENT if arguments.get(key) is not None}
        if "tools" not in sent:
            sent.pop("tool_choice", None)
        return answers(**endpoint.complete({**sent, "model": settings.user_model}))

    vars(importlib.import_module("tau2.utils.llm_utils"))["completion"] = completion
    judge = importlib.import_module("tau2.evaluator.evaluator_nl_assertions")
    vars(judge).update(
        DEFAULT_LLM_NL_ASSERTIONS=settings.user_model, DEFAULT_LLM_NL_ASSERTIONS_ARGS={"temperature": 0.0}
    )
    return module.UserSimulator(llm=settings.user_model, instructions=str(task.user_scenario), tools=tools)
