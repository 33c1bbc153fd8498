"""The other side of `python -m bench peers`: TRL's GRPOTrainer on the environments of this project.

    python -m bench.peers.trl_grpo FOLDER       # reads settings.json, appends steps.jsonl

The dialogue is rendered, parsed and scored by the same code as in a rollout worker. All trajectories of a batch sample
their message together, with generate() of transformers; the next message begins when all have theirs.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.peers.settings import PeerSettings
from palimpsest.common.environments.port import Environment, Score
from palimpsest.common.environments.tool_calls import read
from palimpsest.common.sessions.registry import CLASSES
from palimpsest.services.rollout.chat_renderer import ChatRenderer


@dataclass
class Trajectory:
    """One trajectory, as it grows."""

    environment: Environment
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    """1 for each token of the completion that the model sampled, else 0."""
    score: Score | None = None


class Rollouts:
    """A rollout_func of TRL: samples the trajectories of a batch."""

    def __init__(self, settings: PeerSettings, renderer: ChatRenderer) -> None:
        self._settings, self._renderer = settings, renderer
        self.tokens = 0
        """Sampled tokens of the newest batch."""
        self.successes = ""
        """"1" or "0" for each of its trajectories."""

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """Sample one trajectory for each prompt, which is the seed of a task."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        trajectories = [self._begun(int(seed)) for seed in prompts]
        model.eval()
        with torch.no_grad():
            for turn in range(self._settings.max_turns):
                live = [trajectory for trajectory in trajectories if trajectory.score is None]
                if not live:
                    break
                self._sample(model, live)
                self._step(live, last=turn == self._settings.max_turns - 1)
        model.train()
        scores = [trajectory.score or trajectory.environment.finalize() for trajectory in trajectories]
        self.tokens = sum(sum(trajectory.sampled) for trajectory in trajectories)
        self.successes = "".join("1" if score.success else "0" for score in scores)
        return {
            "prompt_ids": [trajectory.prompt for trajectory in trajectories],
            "completion_ids": [trajectory.completion for trajectory in trajectories],
            "logprobs": None,  # type: ignore[dict-item]  # sampled by the trained weights: TRL computes them
            "env_mask": [trajectory.sampled for trajectory in trajectories],
            "score": [score.reward for score in scores],
        }

    def _begun(self, seed: int) -> Trajectory:
        environment = CLASSES[self._settings.environment]()
        opening = environment.reset(seed)
        return Trajectory(environment, list(self._renderer.begin(opening.messages, opening.tools)))

    def _sample(self, model: Any, live: list[Trajectory]) -> None:
        """Let the model add one message to each trajectory."""
        rows = [trajectory.prompt + trajectory.completion for trajectory in live]
        longest = max(map(len, rows))
        pad = self._renderer.stop_tokens[0]
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        room = self._settings.max_trajectory_tokens - longest
        most = max(1, min(self._settings.max_turn_tokens, room))
        found = model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=True, temperature=self._settings.temperature, top_k=0,
            top_p=1.0, max_new_tokens=most, eos_token_id=list(self._renderer.stop_tokens), pad_token_id=pad,
        )[:, longest:].tolist()  # fmt: skip
        for trajectory, message in zip(live, found, strict=True):
            ends = [place for place, token in enumerate(message) if token in self._renderer.stop_tokens]
            own = message[: ends[0] + 1] if ends else message
            trajectory.completion += own
            trajectory.sampled += [1] * len(own)

    def _step(self, live: list[Trajectory], *, last: bool) -> None:
        """Let each environment answer the message of its trajectory."""
        for trajectory in live:
            message = _newest_message(trajectory)
            if message[-1] not in self._renderer.stop_tokens:  # truncated
                trajectory.score = trajectory.environment.finalize()
                continue
            outcome = trajectory.environment.step(read(self._renderer.text(message)))
            if isinstance(outcome, Score):
                trajectory.score = outcome
                continue
            separator = self._renderer.render_turn_separator(outcome.messages, ended_by=message[-1])
            used = len(trajectory.prompt) + len(trajectory.completion) + len(separator)
            if last or used >= self._settings.max_trajectory_tokens:
                trajectory.score = trajectory.environment.finalize()
                continue
            trajectory.completion += separator
            trajectory.sampled += [0] * len(separator)


def _newest_message(trajectory: Trajectory) -> list[int]:
    """The sampled tokens at the end of the trajectory."""
    size = len(trajectory.sampled)
    begin = next((place + 1 for place in range(size - 1, -1, -1) if not trajectory.sampled[place]), 0)
    return trajectory.completion[begin:]


class Steps(TrainerCallback):  # type: ignore[misc]
    """Appends a line for each step."""

    def __init__(self, file: Path, rollouts: Rollouts) -> None:
        self._file, self._rollouts, self._began = file, rollouts, time.monotonic()

    def on_train_begin(self, *_args: Any, **_values: Any) -> None:
        """Note when the first step begins."""
        self._began = time.monotonic()

    def on_step_end(self, *_args: Any, **_values: Any) -> None:
        """Write the line of the step."""
        now = time.monotonic()
        line = {"seconds": now - self._began, "tokens": self._rollouts.tokens, "successes": self._rollouts.successes}
        self._began = now
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _schedule(settings: PeerSettings) -> Any:
    def share(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        if not settings.decay:
            return 1.0
        passed = min(1.0, (step - settings.warmup) / (settings.decay - settings.warmup))
        return 1.0 - (1.0 - settings.end_share) * passed

    return share


def main(home: Path) -> None:
    """Train."""
    settings = PeerSettings(**json.loads((home / "settings.json").read_text()))
    torch.set_num_threads(settings.threads)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    rollouts = Rollouts(settings, ChatRenderer.load(settings.model, {}))
    batch = settings.groups * settings.samples
    options = GRPOConfig(
        output_dir=str(home / "trl"), per_device_train_batch_size=batch, num_generations=settings.samples,
        max_steps=settings.steps, max_completion_length=settings.max_trajectory_tokens, beta=0.0,
        epsilon=settings.clip_low, epsilon_high=settings.clip_high, delta=settings.dual_clip or None,
        entropy_coef=settings.entropy, temperature=settings.temperature, max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16", use_cpu=True, seed=settings.seed, save_strategy="no", report_to=[],
        logging_steps=settings.steps, disable_tqdm=True, gradient_checkpointing=False, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=_reward,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": [str(seed) for seed in range(settings.steps * settings.groups)]}),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        rollout_func=rollouts,
        optimizers=(optimizer, LambdaLR(optimizer, _schedule(settings))),
        callbacks=[Steps(home / "steps.jsonl", rollouts)],
    )
    trainer.train()


def _reward(score: list[float], **_fields: Any) -> list[float]:
    return score


if __name__ == "__main__":
    main(Path(sys.argv[1]))
