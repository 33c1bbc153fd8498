"""A training step of the learner: replicated, sharded, packed, and a bare FSDP2 loop with the same model and batch.

    .venv/bin/python -m bench learner [--ranks 2 [4 ...]] [--layers 8] [--hidden 512] [--rows 8] [--length 512]
    .venv/bin/python -m bench learner --shortest 64 --micro-batch-tokens 1024 --modes replicated packed
    .venv/bin/python -m bench learner --growth 2048 8192 32768 --layers 2 --hidden 128 --vocabulary 4096

A model of the Qwen3 shape with random weights is written to a temporary folder. Each mode runs in its own ranks under
torchrun (one thread each), the modes in turn, `--rounds` times:

    replicated   learner.sharding = "none": each rank holds the whole model
    packed       the same with learner.layout = "packed"
    sharded      learner.sharding = "full"
    long         the same with learner.layout = "packed" and learner.activation_checkpointing
    context      the same with learner.context_parallel = --ranks: all ranks share each row
    bare         transformers, fully_shard for each block, cross-entropy of all logits, AdamW: no learner around it

A step trains on `--rows` rows. The longest has `--length` tokens, the shortest `--shortest` (default: equally many);
the lengths between grow geometrically. A pass has at most `--micro-batch-tokens` (default: one row of the greatest
length); the bare loop passes one row at a time. Seconds are those of the fastest step; cpu_seconds are the processor
time of a rank, which other programs on the machine change less. Memory is the peak of the resident memory of a rank
from before the model is loaded to after the last step. Bytes moved are what a rank sends in a step, computed from the
sizes of its collectives: n - 1 times its part in an all-gather, (n - 1) / n of the input in a reduce-scatter, twice
that in an all-reduce.

Prints one JSON line: settings, and of each mode tokens_per_s, seconds, cpu_seconds, peak_bytes and moved_bytes (the
largest of the ranks); step_ratio_to_bare (bare seconds / sharded seconds), cpu_ratio_to_bare, peak_ratio_to_replicated
(sharded / replicated), packed_speedup and packed_cpu_speedup (replicated / packed), as far as their modes ran. With
several numbers of ranks, the line has such an object for each of them, under `of_ranks`.

With `--growth`, each number is a step of one rank on so many tokens, packed and with activation checkpointing: as one
row, and as rows of the first number. Everything but the attention does the same in both, so the second column shows
whether that is linear in time. Prints for each number: tokens, and of the row and of the rows seconds, cpu_seconds
and peak_bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODES = ("replicated", "packed", "sharded", "long", "context", "bare")
RATIOS = (
    ("step_ratio_to_bare", "bare", "sharded", "seconds"),
    ("cpu_ratio_to_bare", "bare", "sharded", "cpu_seconds"),
    ("peak_ratio_to_replicated", "sharded", "replicated", "peak_bytes"),
    ("packed_speedup", "replicated", "packed", "seconds"),
    ("packed_cpu_speedup", "replicated", "packed", "cpu_seconds"),
)
"""Name, numerator, denominator and measure."""


def main(words: Sequence[str]) -> dict[str, Any]:
    """Measure every mode. Returns the result."""
    arguments = argparse.ArgumentParser(
        prog="python -m bench learner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--ranks", nargs="+", type=int, default=[2], help="ranks of the learner, one or several numbers (default 2)"
    )
    arguments.add_argument("--layers", type=int, default=8, help="layers of the model (default 8)")
    arguments.add_argument("--hidden", type=int, default=512, help="hidden size (default 512)")
    arguments.add_argument("--vocabulary", type=int, default=32768, help="vocabulary entries (default 32768)")
    arguments.add_argument("--rows", type=int, default=8, help="rows of a step (default 8)")
    arguments.add_argument("--length", type=int, default=512, help="tokens of the longest row (default 512)")
    arguments.add_argument("--shortest", type=int, help="tokens of the shortest row (default --length)")
    arguments.add_argument("--micro-batch-tokens", type=int, help="tokens of a pass (default --length)")
    arguments.add_argument("--steps", type=int, default=3, help="measured steps of a round (default 3)")
    arguments.add_argument("--rounds", type=int, default=1, help="rounds of all modes (default 1)")
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="modes to run (default all)")
    arguments.add_argument("--growth", nargs="+", type=int, help="tokens of a step in each line of a table of growth")
    options = vars(arguments.parse_args(words))
    with tempfile.TemporaryDirectory() as folder:
        if options["growth"]:
            return _growth(Path(folder), options)
        results = [_compared(Path(folder) / str(ranks), options | {"ranks": ranks}) for ranks in options["ranks"]]
    return results[0] if len(results) == 1 else {"of_ranks": results}


def _compared(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Measure each mode on the same rows."""
    lengths = _lengths(options)
    parameters = _write_model(folder / "model", options)
    task = {"lengths": lengths, "micro_batch_tokens": options["micro_batch_tokens"] or max(lengths)}
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in options["modes"]}
    for _ in range(options["rounds"]):
        for mode in options["modes"]:
            found[mode].append(_measured(mode, folder, options, task))
    modes = {mode: _best(rounds, sum(lengths)) for mode, rounds in found.items()}
    ratios = {
        name: modes[above][what] / modes[below][what]
        for name, above, below, what in RATIOS
        if above in modes and below in modes
    }
    settings = {name: value for name, value in options.items() if name not in ("growth", "modes")}
    return {"settings": settings | {"parameters": parameters, "tokens": sum(lengths)}, **modes, **ratios}


def _growth(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Measure a step on more and more tokens, as one row and as rows of the first number."""
    numbers = sorted(options["growth"])
    options = options | {"ranks": 1, "length": numbers[-1]}
    parameters = _write_model(folder / "model", options)
    table = []
    for tokens in numbers:
        row = _measured("long", folder, options, {"lengths": [tokens], "micro_batch_tokens": tokens})
        split = [numbers[0]] * (tokens // numbers[0])
        rows = _measured("long", folder, options, {"lengths": split, "micro_batch_tokens": tokens})
        line: dict[str, float] = {"tokens": tokens}
        for measure in ("seconds", "cpu_seconds", "peak_bytes"):
            line |= {measure: row[measure], f"rows_{measure}": rows[measure]}
        table.append(line)
    settings = {name: options[name] for name in ("layers", "hidden", "vocabulary", "steps")}
    return {"settings": settings | {"parameters": parameters}, "growth": table}


def _lengths(options: dict[str, Any]) -> list[int]:
    """Tokens of each row, shortest first."""
    rows, longest = options["rows"], options["length"]
    shortest = options["shortest"] or longest
    return [round(shortest * (longest / shortest) ** (i / max(1, rows - 1))) for i in range(rows)]


def _best(rounds: Sequence[dict[str, float]], tokens: int) -> dict[str, float]:
    seconds = min(each["seconds"] for each in rounds)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "cpu_seconds": min(each["cpu_seconds"] for each in rounds),
        "peak_bytes": min(each["peak_bytes"] for each in rounds),
        "moved_bytes": rounds[0]["moved_bytes"],
    }


def _write_model(folder: Path, options: dict[str, Any]) -> int:
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


def _measured(mode: str, folder: Path, options: dict[str, Any], task: dict[str, Any]) -> dict[str, float]:
    """Run a mode in its own ranks. Returns the largest values of the ranks."""
    result = folder / f"{mode}.json"
    given = task | {"vocabulary": options["vocabulary"], "steps": options["steps"]}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options['ranks']}",
        "-m", "bench.learner.rank", mode, str(folder / "model"), str(result), json.dumps(given),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{mode}: {done.stdout[-2000:]}")
    measured: dict[str, float] = json.loads(result.read_text())
    return measured
