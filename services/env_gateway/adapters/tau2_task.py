"""Tasks of tau2-bench, from the user's own checkout, with its orchestrator and its evaluator.

The package `tau2` of the Python registry is an unrelated one and is refused. `user` says who the user is:

- `none`: solo mode; the model has the tools of both sides and ends the task with the tool `done`
- `scripted`: a user without a model, see tau2_users.py
- `model`: tau2-bench's own simulator on an OpenAI-compatible endpoint, which also judges natural-language assertions

Only the user ends a dialogue. A session that a limit ends has the reward 0, as in tau2-bench.
"""

import importlib
import os
import time
from pathlib import Path
from typing import Any

from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.port import Message, Opening, Score
from palimpsest.services.env_gateway.adapters import tau2_users
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable
from palimpsest.services.env_gateway.adapters.checkout import Project, load
from palimpsest.services.env_gateway.adapters.dialogue_task import STEPS, DialogueTask

PROJECT = Project(
    name="tau2-bench",
    repository="sierra-research/tau2-bench",
    package="tau2",
    imports="palimpsest.services.env_gateway.adapters.tau2_imports",
)
_DOMAINS = {"telecom_small": "telecom", "telecom_full": "telecom"}
"""Task set -> domain, where their names differ."""


class Tau2Task(DialogueTask):
    """See port.py. `checkout` is the folder, `id` a task set such as `retail`, `split` one of its splits."""

    version = "tau2"

    def reset(self, seed: int) -> Opening:
        self.needed("checkout", "id", "user")
        checkout = Path(self.settings.checkout).resolve()
        os.environ.setdefault("TAU2_DATA_DIR", str(checkout / "data"))
        load(PROJECT, self.settings.checkout)
        self._registry = importlib.import_module("tau2.registry").registry
        tasks = self._tasks()
        self._task = tasks[row_of(seed, len(tasks), 0)]
        self._count = len(tasks)
        self._solo = self.settings.user == "none"
        domain = _DOMAINS.get(self.settings.id, self.settings.id)
        build = importlib.import_module("tau2.runner.build")
        try:
            environment = build.build_environment(domain, solo_mode=self._solo)
        except OSError as error:
            raise AdapterUnusable(f"the checkout lacks data of {domain}: {error}") from None
        user = tau2_users.make(self.settings, environment, self._task)
        self._agent = tau2_users.queued_agent(environment, self._task, solo=self._solo)
        module = importlib.import_module("tau2.orchestrator.orchestrator")
        self._orchestrator = module.Orchestrator(
            domain=domain, agent=self._agent, user=user, environment=environment, task=self._task, max_steps=STEPS,
            max_errors=STEPS, seed=seed % 2**31, solo_mode=self._solo, validate_communication=True,
        )  # fmt: skip
        self._orchestrator._run_start_perf = time.perf_counter()
        self._orchestrator._run_start_time = importlib.import_module("tau2.utils.utils").get_now()
        first = [Message(role="system", content=self._agent.system_prompt)]
        if self._solo:
            first.append(Message(role="user", content=tau2_users.START))
        else:
            first += self._begin()
        return Opening(tuple(first), tuple(tool.openai_schema for tool in self._agent.tools))

    def finalize(self) -> Score:
        reasons = importlib.import_module("tau2.data_model.simulation").TerminationReason
        self._orchestrator.done, self._orchestrator.termination_reason = True, reasons.MAX_STEPS
        return self._score()

    def about(self) -> str:
        return (
            f"{self.settings.id} of tau2-bench ({self.settings.split}, user: {self.settings.user}), {self._count} tasks"
        )

    def _put(self, text: str, calls: list[dict[str, Any]]) -> None:
        super()._put(text, calls)
        if self._solo and not self._orchestrator.trajectory:
            self._orchestrator.initialize()  # it takes the model's first message

    def _advance(self) -> None:
        super()._advance()
        self._orchestrator._check_termination()

    def _score(self) -> Score:
        simulation = importlib.import_module("tau2.data_model.simulation")
        evaluator = importlib.import_module("tau2.evaluator.evaluator")
        kind = evaluator.EvaluationType.ALL if self.settings.evaluation == "all" else evaluator.EvaluationType.ENV
        orchestrator = self._orchestrator
        reason = orchestrator.termination_reason
        if reason is simulation.TerminationReason.USER_ERROR:
            raise RuntimeError("the simulated user broke the rules of the dialogue")
        run = simulation.SimulationRun(
            id="session", task_id=self._task.id, start_time="", end_time="", duration=0.0,
            termination_reason=reason.value, messages=orchestrator.get_trajectory(), seed=orchestrator.seed,
        )  # fmt: skip
        found = evaluator.evaluate_simulation(
            simulation=run, task=self._task, evaluation_type=kind, solo_mode=self._solo, domain=orchestrator.domain
        )
        self.rewards.append(float(found.reward))
        return self.score()

    def _tasks(self) -> Any:
        """Return the tasks. Raises AdapterUnusable if there are none, or if they need a judge that is missing."""
        name, split = self.settings.id, self.settings.split
        if name not in self._registry.get_task_sets():
            raise AdapterUnusable(
                f"tau2-bench has no task set {name!r}, only {', '.join(self._registry.get_task_sets())}"
            )
        splits = self._registry.get_task_splits_loader(name)
        try:
            named = splits() if splits is not None else {}
            if splits is not None and split not in named:
                raise AdapterUnusable(f"the task set {name} has no split {split!r}, only {', '.join(named)}")
            load = self._registry.get_tasks_loader(name)
            tasks = load() if splits is None else load(split)
        except OSError as error:
            raise AdapterUnusable(f"the checkout lacks data of {name}: {error}") from None
        if self.settings.user == "none":
            check = importlib.import_module("tau2.agent.llm_agent").LLMSoloAgent.check_valid_task
            tasks = [task for task in tasks if check(task)]
        if not tasks:
            raise AdapterUnusable(f"{name} has no task for user = {self.settings.user!r}")
        judged = [task for task in tasks if "NL_ASSERTION" in _basis(task)]
        if judged and self.settings.evaluation == "all" and self.settings.user != "model":
            raise AdapterUnusable(
                f'{len(judged)} of {len(tasks)} tasks of {name} are judged by a model: set user = "model" with its '
                f'endpoint, or evaluation = "environment" to score the database alone, not as published'
            )
        return tasks


def _basis(task: Any) -> list[str]:
    criteria = task.evaluation_criteria
    return [one.value for one in criteria.reward_basis] if criteria is not None else []
