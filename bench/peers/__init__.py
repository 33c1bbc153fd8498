"""python -m bench peers: this project beside TRL's GRPO, on the same model, tasks, rewards and batch.

    .venv/bin/python -m bench peers [--steps 500] [--seeds 3] [--large] [--run examples/embedded.toml]

Both sides train one after the other, seed by seed, each side first in turn. TRL has an environment of its own below
--environments, which is made when it is first needed. Its rollouts come from the project's environment, renderer and
rewards and a Hugging Face generate loop; learning rate, warmup, clips, temperature and limits are those of the run.
TRL trains the last batch that it sampled, in float32 (--dtype); the project trains asynchronously, in bf16 with
float32 master weights. --large: a random model of 30 M parameters and answers of up to 512 tokens; it learns nothing,
so only its costs count.

    cpu_seconds_per_step_ratio    processor seconds of all processes for each step, ours / TRL's
    trained_tokens_per_s_ratio    tokens that the model sampled and that were trained, for each second
    seconds_to_success_ratio      seconds until the mean of the newest 1,000 rewards is 0.8; a side that never gets
                                  there counts with its whole time

The count begins with the end of the first step. The ratios are medians over the seeds. Prints one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers.environment import ROOT, TRL, interpreter
from bench.peers.processor_time import ProcessorTime
from bench.peers.steps import Side, Step, ratios, side
from bench.rollout import enlarge
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig

LARGE_ANSWER = 512
"""Tokens of an answer with --large."""


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run both sides for each seed. Returns the figures."""
    options = argparse.ArgumentParser(
        prog="python -m bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=500, help="versions of ours, optimizer steps of TRL")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--run", default="examples/embedded.toml", help="file of the run")
    options.add_argument("--large", action="store_true", help="30 M parameters, answers of 512 tokens")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of TRL's model")
    options.add_argument("--trl", default=TRL, help="version of TRL")
    options.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "palimpsest" / "peers")
    known, flags = options.parse_known_args(words)
    python = interpreter(known.environments, known.trl)
    rounds = []
    for seed in range(known.seeds):
        with tempfile.TemporaryDirectory(prefix="palimpsest-bench-") as folder:
            rounds.append(_round(known, flags, seed, python, Path(folder)))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    names = rounds[0]["ratios"].keys()
    return {
        "name": "peers",
        "peer": f"trl {known.trl}",
        "precision": {"ours": "bfloat16, float32 masters", "trl": known.dtype},
        "large": known.large,
        "steps": known.steps,
        **{name: median(each["ratios"][name] for each in rounds) for name in names},
        "rounds": rounds,
    }


def _round(known: argparse.Namespace, flags: list[str], seed: int, python: Path, folder: Path) -> dict[str, Any]:
    """Run both sides with one seed."""
    words = [known.run, "--run.id=bench", f"--run.folder={folder}", f"--run.seed={seed}", *flags]
    words += [f"--learner.versions={known.steps}"]
    config = load(words, {}, program="python -m bench peers").config
    model = str(Path(config.model.path).resolve())
    if known.large:
        model = str(enlarge(Path(model), folder / "model"))
        words += [f"--sampling.max_turn_tokens={LARGE_ANSWER}", f"--sampling.max_trajectory_tokens={2 * LARGE_ANSWER}"]
        words += ["--learner.groups_per_batch=2"]
    words += [f"--model.path={model}"]
    config = load(words, {}, program="python -m bench peers").config
    sides: dict[str, Callable[[], Side]] = {
        "ours": lambda: _ours(words, folder / "bench"),
        "trl": lambda: _trl(config, known, model, python, folder),
    }
    loads, found = {}, {}
    for name in list(sides) if seed % 2 == 0 else list(sides)[::-1]:
        loads[name] = [round(os.getloadavg()[0], 1)]
        found[name] = sides[name]()
        loads[name].append(round(os.getloadavg()[0], 1))
    return {
        "seed": seed,
        "ratios": ratios(found["ours"], found["trl"]),
        "load_before_and_after": loads,
        **{name: asdict(each) for name, each in found.items()},
    }


def _ours(words: Sequence[str], home: Path) -> Side:
    command = [sys.executable, "-m", "palimpsest", "run", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    with ProcessorTime(process.pid) as processor:
        code = process.wait()
    if code:
        raise RuntimeError(f"the run ended with code {code}: {' '.join(command)}")
    lines = [json.loads(line) for line in (home / "history.jsonl").read_text().splitlines()]
    steps = [Step(each["published"], each["tokens"], each["batch"], each["reward"]) for each in lines]
    return side(steps, processor.samples)


def _trl(config: RunConfig, known: argparse.Namespace, model: str, python: Path, folder: Path) -> Side:
    learner, sampling = config.learner, config.sampling
    settings = {
        "model": model, "dtype": known.dtype, "seed": config.run.seed, "steps": known.steps, "threads": os.cpu_count(),
        "batch": learner.groups_per_batch * config.tasks.samples_per_group, "folder": str(folder / "trl"),
        "samples_per_group": config.tasks.samples_per_group, "lr": learner.optimizer.lr,
        "warmup": learner.optimizer.warmup, "temperature": sampling.temperature, "clip_high": learner.loss.clip_high,
        "max_turn_tokens": sampling.max_turn_tokens, "max_turns": sampling.max_turns,
        "max_trajectory_tokens": sampling.max_trajectory_tokens,
    }  # fmt: skip
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(Path(__file__).with_name("trl_run.py")), str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with ProcessorTime(process.pid) as processor:
        steps = [Step(**json.loads(line)) for line in process.stdout if line.startswith('{"at"')]
        code = process.wait()
    if code:
        raise RuntimeError(f"TRL ended with code {code}: {' '.join(command)}")
    return side(steps, processor.samples)
