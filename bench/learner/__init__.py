"""A training step of the learner: replicated, sharded, and a bare FSDP2 loop with the same model and batch.

    .venv/bin/python -m bench learner [--ranks 2] [--layers 8] [--hidden 512] [--rows 8] [--length 512]

A model of the Qwen3 shape with random weights is written to a temporary folder. Each mode runs in its own ranks under
torchrun (one thread each), the modes in turn, `--rounds` times:

    replicated   learner.sharding = "none": each rank holds the whole model
    sharded      learner.sharding = "full"
    bare         transformers, fully_shard for each block, cross-entropy of all logits, AdamW: no learner around it

A step trains on `--rows` rows of `--length` tokens, one row for each pass. Seconds are those of the fastest step.
Memory is the peak of the resident memory of a rank from before the model is loaded to after the last step. Bytes moved
are what a rank sends in a step, computed from the sizes of its collectives: n - 1 times its part in an all-gather,
(n - 1) / n of the input in a reduce-scatter, twice that in an all-reduce.

Prints one JSON line: settings, and of each mode tokens_per_s, seconds, peak_bytes and moved_bytes (the largest of the
ranks); step_ratio_to_bare (bare seconds / sharded seconds) and peak_ratio_to_replicated (sharded / replicated).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODES = ("replicated", "sharded", "bare")


def main(words: Sequence[str]) -> dict[str, Any]:
    """Measure every mode. Returns the result."""
    arguments = argparse.ArgumentParser(
        prog="python -m bench learner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--ranks", type=int, default=2, help="ranks of the learner (default 2)")
    arguments.add_argument("--layers", type=int, default=8, help="layers of the model (default 8)")
    arguments.add_argument("--hidden", type=int, default=512, help="hidden size (default 512)")
    arguments.add_argument("--vocabulary", type=int, default=32768, help="vocabulary entries (default 32768)")
    arguments.add_argument("--rows", type=int, default=8, help="rows of a step (default 8)")
    arguments.add_argument("--length", type=int, default=512, help="tokens of a row (default 512)")
    arguments.add_argument("--steps", type=int, default=3, help="measured steps of a round (default 3)")
    arguments.add_argument("--rounds", type=int, default=1, help="rounds of all modes (default 1)")
    options = vars(arguments.parse_args(words))
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        parameters = _write_model(Path(folder) / "model", options)
        for _ in range(options["rounds"]):
            for mode in MODES:
                found[mode].append(_measured(mode, Path(folder), options))
    modes = {mode: _best(rounds, options["rows"] * options["length"]) for mode, rounds in found.items()}
    return {
        "settings": options | {"parameters": parameters},
        **modes,
        "step_ratio_to_bare": modes["bare"]["seconds"] / modes["sharded"]["seconds"],
        "peak_ratio_to_replicated": modes["sharded"]["peak_bytes"] / modes["replicated"]["peak_bytes"],
    }


def _best(rounds: Sequence[dict[str, float]], tokens: int) -> dict[str, float]:
    seconds = min(each["seconds"] for each in rounds)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "peak_bytes": min(each["peak_bytes"] for each in rounds),
        "moved_bytes": rounds[0]["moved_bytes"],
    }


def _write_model(folder: Path, options: dict[str, int]) -> int:
    """Write the model. Returns the number of its parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    heads = max(1, options["hidden"] // 64)
    config = Qwen3Config(
        vocab_size=options["vocabulary"], hidden_size=options["hidden"], intermediate_size=3 * options["hidden"],
        num_hidden_layers=options["layers"], num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        head_dim=64, max_position_embeddings=options["length"], tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _measured(mode: str, folder: Path, options: dict[str, int]) -> dict[str, float]:
    """Run a mode in its own ranks. Returns the largest values of the ranks."""
    result = folder / f"{mode}.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options['ranks']}",
        "-m", "bench.learner.rank", mode, str(folder / "model"), str(result), *map(str, _sizes(options)),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{mode}: {done.stdout[-2000:]}")
    measured: dict[str, float] = json.loads(result.read_text())
    return measured


def _sizes(options: dict[str, int]) -> tuple[int, ...]:
    return options["rows"], options["length"], options["vocabulary"], options["steps"]
