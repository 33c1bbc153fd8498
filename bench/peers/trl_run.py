"""GRPO of TRL on the project's tasks. Runs in the peer's environment (environment.py), not in the project's.

    python trl_run.py SETTINGS.json

Prints a JSON line for each optimizer step: `at`, `tokens`, `rewards`, `reward`. A dialogue has the project's prompts,
tool results, turn separators and rewards; a Hugging Face generate loop samples its messages.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

from palimpsest.common.environments.lookup import Lookup
from palimpsest.common.environments.port import Score
from palimpsest.common.environments.tool_calls import read
from palimpsest.services.rollout.chat_renderer import ChatRenderer


class SampledTask:
    """One trajectory."""

    def __init__(self, seed: int, renderer: ChatRenderer) -> None:
        self.task, self.renderer = Lookup(), renderer
        opening = self.task.reset(seed)
        self.prompt = list(renderer.begin(opening.messages, opening.tools))
        self.tokens: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[float] = []
        self.reward = 0.0
        self.live = True

    def extend(self, sampled: list[int], logprobs: list[float], limits: dict[str, Any]) -> None:
        """Take a message; step the task; append the separator and the tool's results."""
        self.tokens += sampled
        self.mask += [1] * len(sampled)
        self.logprobs += logprobs
        ended = bool(sampled) and sampled[-1] in self.renderer.stop_tokens
        outcome = self.task.step(read(self.renderer.text(sampled))) if ended else self.task.finalize()
        if isinstance(outcome, Score):
            self.reward, self.live = outcome.reward, False
            return
        between = list(self.renderer.render_turn_separator(outcome.messages, ended_by=sampled[-1]))
        room = limits["max_trajectory_tokens"] - len(self.prompt) - len(self.tokens) - len(between)
        if room < 1 or sum(self.mask) >= limits["max_turns"] * limits["max_turn_tokens"]:
            self.reward, self.live = self.task.finalize().reward, False
            return
        self.tokens += between
        self.mask += [0] * len(between)
        self.logprobs += [0.0] * len(between)


class Rollouts:
    """The `rollout_func` of the trainer."""

    def __init__(self, renderer: ChatRenderer, settings: dict[str, Any], pad: int) -> None:
        self.renderer, self.settings, self.pad = renderer, settings, pad
        self.tokens, self.rewards = 0, list[float]()

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Sample a dialogue for each prompt, which is the seed of a task."""
        dialogues = [SampledTask(int(prompt), self.renderer) for prompt in prompts]
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        while live := [dialogue for dialogue in dialogues if dialogue.live]:
            self._turn(model, live)
        model.train(was_training)
        self.tokens = sum(sum(dialogue.mask) for dialogue in dialogues)
        self.rewards = [dialogue.reward for dialogue in dialogues]
        return {
            "prompt_ids": [dialogue.prompt for dialogue in dialogues],
            "completion_ids": [dialogue.tokens for dialogue in dialogues],
            "logprobs": [dialogue.logprobs for dialogue in dialogues],
            "env_mask": [dialogue.mask for dialogue in dialogues],
            "earned": self.rewards,
        }

    @torch.no_grad()
    def _turn(self, model: Any, live: list[SampledTask]) -> None:
        rows = [dialogue.prompt + dialogue.tokens for dialogue in live]
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        stops = list(self.renderer.stop_tokens)
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=self.settings["temperature"], top_k=0,
            top_p=1.0, max_new_tokens=self.settings["max_turn_tokens"], eos_token_id=stops, pad_token_id=self.pad,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        scores = torch.stack(made.scores, 1).float().log_softmax(-1)
        sampled = made.sequences[:, width:]
        values = scores.gather(-1, sampled[..., None])[..., 0].tolist()
        for dialogue, tokens, logprobs in zip(live, sampled.tolist(), values, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
            room = self.settings["max_trajectory_tokens"] - len(dialogue.prompt) - len(dialogue.tokens)
            end = min(end, room)
            dialogue.extend(tokens[:end], logprobs[:end], self.settings)


class Report(TrainerCallback):  # type: ignore[misc]
    """Prints the line of a step."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """See TrainerCallback."""
        rewards = self.rollouts.rewards
        line = {
            "at": time.time(), "tokens": self.rollouts.tokens, "rewards": len(rewards),
            "reward": sum(rewards) / len(rewards),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main() -> None:
    """Train."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    renderer = ChatRenderer.load(settings["model"], {})
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
    rollouts = Rollouts(renderer, settings, tokenizer.pad_token_id)
    numbers = random.Random(settings["seed"])  # noqa: S311
    groups = settings["batch"] // settings["samples_per_group"]
    seeds = [{"prompt": str(numbers.randrange(1 << 30))} for _ in range(groups * (settings["steps"] + 1))]
    config = GRPOConfig(
        output_dir=settings["folder"], max_steps=settings["steps"], per_device_train_batch_size=settings["batch"],
        num_generations=settings["samples_per_group"], learning_rate=settings["lr"],
        warmup_steps=settings["warmup"], lr_scheduler_type="linear", temperature=settings["temperature"],
        max_completion_length=settings["max_trajectory_tokens"], beta=0.0, epsilon=0.2,
        epsilon_high=settings["clip_high"], seed=settings["seed"], bf16=False, fp16=False, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(seeds), processing_class=tokenizer,
        reward_funcs=lambda earned, **_: earned, rollout_func=rollouts, callbacks=[Report(rollouts)],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
