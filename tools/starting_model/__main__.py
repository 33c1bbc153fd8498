"""python -m tools.starting_model FOLDER [--untied]: build the starting model, in about ten seconds."""

import argparse
import shutil
from pathlib import Path

import torch

from palimpsest.services.rollout.chat_renderer import ChatRenderer
from tools.starting_model.tokenizer import build
from tools.starting_model.warm_start import STEPS, untrained, warm_start

SEED = 1


def main() -> None:
    """Write the folder atomically."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path, help="folder to write")
    arguments.add_argument("--untied", action="store_true", help="a separate output head, for tests")
    options = arguments.parse_args()
    write(options.folder, tied=not options.untied)


def write(folder: Path, *, tied: bool) -> None:
    """Build the model in `folder`. Machines of one kind write the same bytes."""
    torch.set_num_threads(1)
    tokenizer = build()
    renderer = ChatRenderer(tokenizer, options={})
    model = untrained(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tied=tied, seed=SEED)
    loss = warm_start(model, renderer, steps=STEPS, seed=SEED)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens; loss after the warm start {loss:.2f} nats per token")


if __name__ == "__main__":
    main()
