"""Tasks of VitaBench, from the user's own checkout, with its tools, its simulated user and its evaluator.

The user and the judge are models at two OpenAI-compatible endpoints, each with limits of its own. The package `vita` of
the Python registry is an unrelated one and is refused.

A session that a limit ends, and one whose model writes an empty message, has the reward 0, as in VitaBench. If the user
or the judge fails, the session has no reward. VitaBench itself counts what its judge leaves out as not met.
"""

import importlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.port import Message, Opening, Outcome, Score, Turn
from palimpsest.services.env_gateway.adapters import vitabench_models
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable
from palimpsest.services.env_gateway.adapters.checkout import Project, load
from palimpsest.services.env_gateway.adapters.dialogue_task import STEPS, DialogueTask, QueuedAgent
from palimpsest.services.env_gateway.adapters.limited_endpoint import EndpointFailed
from palimpsest.services.env_gateway.adapters.model_endpoints import judge_endpoint, user_endpoint

PROJECT = Project(
    name="VitaBench",
    repository="meituan-longcat/vitabench",
    package="vita",
    imports="palimpsest.services.env_gateway.adapters.vitabench_imports",
)
DOMAINS = {"delivery": "delivery", "instore": "instore", "ota": "ota", "cross_domain": "delivery,instore,ota"}
"""Task set -> domains whose tools the model has, as VitaBench writes them."""
METHOD = "trajectory"
"""The evaluation that VitaBench publishes: rubrics over a sliding window of the trajectory."""


class VitaBenchTask(DialogueTask):
    """See port.py. `checkout` is the folder, `id` a task set, `language` that of tasks, tools, user and judge."""

    version = "vitabench"

    def reset(self, seed: int) -> Opening:
        self.needed("checkout", "id")
        self._user, self._judge = user_endpoint(self.settings), judge_endpoint(self.settings)
        with _silent():
            load(PROJECT, self.settings.checkout)
            tasks = self._tasks()
            self._task, self._count = tasks[row_of(seed, len(tasks), 0)], len(tasks)
            environment = self._environment()
            self._agent = _queued_agent(environment, self.settings.language)
            vitabench_models.replace(self._user, self.settings.user_model, module="vita.user.user_simulator")
            simulator = importlib.import_module("vita.user.user_simulator").UserSimulator(
                persona=str(self._task.user_scenario.user_profile), instructions=str(self._task.instructions),
                llm=self.settings.user_model, language=self.settings.language,
            )  # fmt: skip
            self._orchestrator = importlib.import_module("vita.orchestrator.orchestrator").Orchestrator(
                domain=environment.domain_name, agent=self._agent, user=simulator, environment=environment,
                task=self._task, max_steps=STEPS, max_errors=STEPS, language=self.settings.language,
            )  # fmt: skip
            first = [Message(role="system", content=self._agent.system_prompt), *self._begin()]
            return Opening(tuple(first), tuple(tool.openai_schema for tool in self._agent.tools))

    def step(self, turn: Turn) -> Outcome:
        with _silent():
            if not turn.attempts and not turn.text:
                return self._ended("INVALID_AGENT_MESSAGE")
            return super().step(turn)

    def finalize(self) -> Score:
        with _silent():
            return self._ended("MAX_STEPS")

    def about(self) -> str:
        return f"{self.settings.id} of VitaBench ({self.settings.language}), {self._count} tasks"

    @classmethod
    def probe(cls, settings: str) -> str:
        """See AdapterEnvironment. The user answers in `reset`; the judge is checked here: a session needs it last."""
        line = super().probe(settings)
        environment = cls(settings)
        try:
            vitabench_models.check(judge_endpoint(environment.settings), environment.settings.judge_model)
        except EndpointFailed as error:
            raise AdapterUnusable(f"the judge cannot be used: {error}") from None
        return line

    def _tasks(self) -> Any:
        """Return the tasks with rubrics, for VitaBench pays any others always. Raises AdapterUnusable if none is left.

        A thread of its own loads them, as in VitaBench: places and products belong to the thread that makes them, and
        the session must not find those of the expected results.
        """
        name, registry = self.settings.id, importlib.import_module("vita.registry").registry
        known = [one for one in DOMAINS if one in registry.get_task_sets()]
        if name not in known:
            raise AdapterUnusable(f"VitaBench has no task set {name!r}, only {', '.join(known)}")
        try:
            with ThreadPoolExecutor(1) as pool:
                tasks = pool.submit(registry.get_tasks_loader(name), self.settings.language).result()
        except (OSError, ValueError) as error:
            raise AdapterUnusable(f"the checkout lacks data of {name} ({self.settings.language}): {error}") from None
        tasks = [task for task in tasks if _is_judged(task)]
        if not tasks:
            raise AdapterUnusable(f"{name} ({self.settings.language}) has no task with rubrics")
        return tasks

    def _environment(self) -> Any:
        """Return the task's world. Its order numbers do not depend on the clock."""
        domains, world = DOMAINS[self.settings.id], self._task.environment
        if "," in domains:
            merge = importlib.import_module("vita.environment.environment").get_cross_environment
            environment = merge(domains, world, self.settings.language)
        else:
            registry = importlib.import_module("vita.registry").registry
            environment = registry.get_env_constructor(domains)(world, self.settings.language)
        vars(importlib.import_module("vita.environment.db"))["datetime"] = vitabench_models.Counter()
        return environment

    def _ended(self, reason: str) -> Score:
        reasons = importlib.import_module("vita.data_model.simulation").TerminationReason
        self._orchestrator.done, self._orchestrator.termination_reason = True, reasons[reason]
        return self._score()

    def _score(self) -> Score:
        orchestrator, world = self._orchestrator, self._orchestrator.environment.tools.db
        run = importlib.import_module("vita.data_model.simulation").SimulationRun(
            id="session", task_id=self._task.id, start_time="", end_time="", duration=0.0,
            termination_reason=orchestrator.termination_reason.value, messages=orchestrator.get_trajectory(),
            states=orchestrator.get_states(world, world.time),
        )  # fmt: skip
        vitabench_models.replace(self._judge, self.settings.judge_model, module="vita.evaluator.evaluator_traj")
        verdicts = vitabench_models.Verdicts(module="vita.evaluator.evaluator_traj")
        found = importlib.import_module("vita.evaluator.evaluator").evaluate_simulation(
            simulation=run, task=self._task, evaluation_type=METHOD, domain=orchestrator.domain,
            llm_evaluator=self.settings.judge_model, llm_args_evaluator={}, language=self.settings.language,
        )  # fmt: skip
        verdicts.check(len(found.nl_rubrics or ()))
        self.rewards.append(float(found.reward))
        return self.score()


def _is_judged(task: Any) -> bool:
    criteria = task.evaluation_criteria
    if criteria is None:
        return False
    return bool(criteria.overall_rubrics or any(state.state_rubrics for state in criteria.expected_states or ()))


def _queued_agent(environment: Any, language: str) -> Any:
    """Return an agent of VitaBench whose next message is put into it."""
    base = importlib.import_module("vita.agent.llm_agent")
    messages = importlib.import_module("vita.data_model.message")

    class PutAgent(QueuedAgent, base.LLMAgent):  # type: ignore[misc, name-defined]
        """It may end the task, as VitaBench tells its models."""

        def put(self, *, text: str, calls: list[dict[str, Any]]) -> None:
            """Set the next message."""
            made = [messages.ToolCall(**call) for call in calls] or None
            self.next_message = messages.AssistantMessage(role="assistant", content=text or None, tool_calls=made)

    return PutAgent(
        tools=environment.get_tools(), domain_policy=environment.get_policy(), time=environment.tools.db.time,
        language=language,
    )  # fmt: skip


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what VitaBench prints: each window of its judge, and the traceback of each mistake of the model."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
