"""Faults of processes in learner_schedules.py, and the configuration of their small run."""

import re
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace

import torch

from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.files import write
from tests.runs.run_process import ROOT
from tests.simulation.cut_learner import RUN

VERSIONS, SAMPLES, GROUPS, STALENESS = 5, 2, 2, 2
VOCABULARY, FIRST_SAMPLED = 32, 8
"""Tokens below FIRST_SAMPLED occur in prompts only."""
ANYWHERE = ""
CONFIG = """
run.id = "{run}"
run.folder = "{folder}"
model.path = "a table"
tasks.environments = {{ any = 1.0 }}
tasks.samples_per_group = {samples}
tasks.time_limit_s = 200
sampling.max_turn_tokens = 4
sampling.max_trajectory_tokens = 60
sampling.max_turns = 3
learner.versions = {versions}
evaluation.every = {evaluated}
evaluation.tasks = 2
evaluation.samples = 2
learner.groups_per_batch = {groups}
learner.max_staleness = {staleness}
learner.canary_trajectories = 2
learner.checkpoint.keep = 1000
learner.publishing = "{publishing}"
learner.checkpoint.every = {every}
learner.proximal.kind = "interruption"
learner.proximal.deadline_s = 5.0
learner.discrepancy.band = "off"
rollout.engine = {{ kind = "vllm", sleep = {sleep} }}
learner.optimizer.lr = 0.1
learner.optimizer.weight_decay = 0.1
"""


class FaultKind(Enum):
    """Fault of a process at a failpoint."""

    DIE = auto()
    PAUSE = auto()
    """A paused learner is replaced and resumes; a paused worker does not reach the log for a while."""
    STOP = auto()
    """As by Ctrl-C: the learner shuts down, and another one continues."""


@dataclass
class Fault:
    """Fault at the `visit`-th visit of the failpoint `place` (common/failpoints.py).

    ANYWHERE: a learner dies at a random time.
    """

    place: str
    visit: int
    kind: FaultKind
    happened: bool = False


def places() -> list[str]:
    """All failpoints in the source of the learner, the workers and the client of the store."""
    found = set()
    for folder in ("services/learner", "services/rollout", "common/snapshots"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"failpoints\.reach\(\"([^\"]+)\"\)", path.read_text()))
    return sorted(found)


class Table(torch.nn.Module):
    """A model whose next token depends only on the current token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.bfloat16)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table


def configured(
    folder: Path,
    *,
    publishing: str = "inline",
    evaluated: int = 3,
    every: int = 1,
    sleep: bool = False,
) -> RunConfig:
    """Configuration of these runs; the first call writes run.toml as a run does, and decides its settings.

    evaluated: versions between two evaluations, 0 for none. every: versions between two checkpoints. sleep: whether the
    engines sleep while the learner trains.
    """
    path = folder / "run.toml"
    if not path.exists():
        text = CONFIG.format(
            run=RUN, folder=folder, samples=SAMPLES, versions=VERSIONS, groups=GROUPS, staleness=STALENESS,
            publishing=publishing, evaluated=evaluated, every=every, sleep=str(sleep).lower(),
        )  # fmt: skip
        path.write_text(text)
        write(folder / RUN / "run.toml", text.encode())
    return load([str(path)], {}, program="").config
