"""`palimpsest eval` of a model folder on the real engine, as a person or a script calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.run_process import ROOT

pytestmark = pytest.mark.vllm


def test_standard_output_is_the_result_alone(starting_model: Path) -> None:
    """A script reads it. vLLM's warnings, progress bars and its end stay off the terminal."""
    words = ["eval", str(starting_model), "--environments=lookup", "--tasks=2", "--samples=2", "--json=-"]
    limits = [
        "--sampling.max_trajectory_tokens=96",
        "--sampling.max_turn_tokens=8",
        "--rollout.engine.kv_cache_gib=0.25",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "palimpsest", *words, *limits], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["engine"] == "vllm"
    assert result["trajectories"]["scored"] == result["evaluation"]["lookup"]["samples"] == 4
    assert "Traceback" not in done.stderr
    assert "Loading safetensors" not in done.stderr
