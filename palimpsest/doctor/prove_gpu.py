"""python -m palimpsest.doctor.prove_gpu [RUN.toml] [--SECTION.KEY=VALUE ...]

Check the GPUs that this process sees, and print the findings as JSON. This program needs the packages of a learner and
of an engine; `palimpsest doctor --gpu` calls it with the Python that has them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence

from palimpsest.doctor.findings import STOPS, Finding

HEAD_SIZE = 128
"""Head size that is checked without a run file."""
NO_GPU = Finding("GPU checks", "skipped: torch sees no GPU")


def main() -> None:
    """Print the findings as JSON."""
    print(json.dumps([dataclasses.asdict(finding) for finding in prove(sys.argv[1:])]))


def prove(words: Sequence[str]) -> list[Finding]:
    """Return the findings of all checks, or that they are skipped."""
    try:
        import torch
    except ImportError as error:
        return [Finding("GPU checks", f"the package {error.name or error} is missing", STOPS, "", "Run `make setup`.")]
    if not torch.cuda.is_available():
        return [NO_GPU]
    from palimpsest.doctor import gpu_checks

    number, device = torch.cuda.device_count(), torch.device("cuda", 0)
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("GPU kind", lambda: gpu_checks.kinds([torch.cuda.get_device_capability(i) for i in range(number)])),
        ("Float32", lambda: gpu_checks.float32(device)),
        ("Attention", lambda: gpu_checks.attention(device, head_size(words))),
        ("Passes of a dense model", lambda: gpu_checks.passes(device, experts=False)),
        ("Passes of a mixture of experts", lambda: gpu_checks.passes(device, experts=True)),
        ("Sum over GPUs", lambda: gpu_checks.all_reduce(number, "nccl")),
        ("vLLM", gpu_checks.engine),
    ]
    return run(checks)


def run(checks: Sequence[tuple[str, Callable[[], Finding | list[Finding]]]]) -> list[Finding]:
    """Return the findings of the checks, each of which may fail without ending the others."""
    findings: list[Finding] = []
    for name, check in checks:
        try:
            found = check()
        except Exception as error:  # of a driver, a kernel or a package: the other checks still run
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            found = Finding(name, f"failed: {text}", STOPS, "A run would fail in the same way.",
                            "Free the GPU of other processes, check the driver, and try again.")  # fmt: skip
        findings += found if isinstance(found, list) else [found]
    return findings


def head_size(words: Sequence[str]) -> int:
    """Return the head size of the model of the run that the words name; HEAD_SIZE without one."""
    from palimpsest.common.config import load
    from palimpsest.common.user_error import UserError

    if not any(not word.startswith("-") for word in words):
        return HEAD_SIZE
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            load(list(words), os.environ, program="palimpsest doctor").config.model.path
        )
    except (UserError, OSError, ValueError):
        return HEAD_SIZE
    text = config.get_text_config()
    size: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size


if __name__ == "__main__":
    main()
