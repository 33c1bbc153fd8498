"""The GPUs that this process may use."""

import os
import subprocess

VARIABLE = "CUDA_VISIBLE_DEVICES"
SMI_TIMEOUT_S = 20.0
"""nvidia-smi takes seconds on a machine with many GPUs whose driver is not kept loaded."""


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs as CUDA_VISIBLE_DEVICES lists them: that variable, or what nvidia-smi counts.

    Empty on a machine without GPUs, and if nvidia-smi fails.
    """
    if (given := os.environ.get(VARIABLE)) is not None:
        return tuple(part for word in given.split(",") if (part := word.strip()) and part != "-1")
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=SMI_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in output.splitlines() if line.strip())
