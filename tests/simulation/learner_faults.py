"""What befalls processes in learner_schedules.py, and the small run that it befalls."""

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
"""Tokens below FIRST_SAMPLED stand in prompts only."""
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
learner.groups_per_batch = {groups}
learner.max_staleness = {staleness}
learner.canary_trajectories = 2
learner.checkpoint.keep = 1000
learner.proximal.kind = "interruption"
learner.proximal.deadline_s = 5.0
learner.optimizer.lr = 0.1
learner.optimizer.weight_decay = 0.1
"""


class How(Enum):
    """What becomes of a process at its place."""

    DIES = auto()
    STANDS_STILL = auto()
    """A learner is replaced meanwhile, and wakes; the log does not hear of a worker for a while."""
    IS_STOPPED = auto()
    """As by Ctrl-C: a learner finishes what it must, and another goes on."""


@dataclass
class Fault:
    """Of the process that comes to `place` (common/failpoints.py) for the `visit`-th time; ANYWHERE: of a learner that
    dies at some moment."""

    place: str
    visit: int
    how: How
    happened: bool = False


def places() -> list[str]:
    """All places of learner and workers where a test can make them fail, from their source."""
    found = set()
    for service in ("learner", "rollout"):
        for path in (ROOT / "services" / service).rglob("*.py"):
            found |= set(re.findall(r"failpoints\.reach\(\"([^\"]+)\"\)", path.read_text()))
    return sorted(found)


class Table(torch.nn.Module):
    """A model whose next token depends on the present one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.bfloat16)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table


def configured(folder: Path) -> RunConfig:
    """Of these runs, in this folder, where it is kept as of any run."""
    path = folder / "run.toml"
    if not path.exists():
        text = CONFIG.format(
            run=RUN, folder=folder, samples=SAMPLES, versions=VERSIONS, groups=GROUPS, staleness=STALENESS
        )
        path.write_text(text)
        write(folder / RUN / "run.toml", text.encode())
    return load([str(path)], {}, program="").config
