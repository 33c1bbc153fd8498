"""The model that a run started from: its folder, the files that an export takes over, the names of its tensors."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from palimpsest.common.model_path import refuse_no_model, sentence
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.export import layout

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""Folder of a model in the hub's cache."""


@dataclass(frozen=True, slots=True)
class StartingModel:
    """Where it lies on this machine, and what it is called."""

    folder: Path
    name: str
    hub_id: str
    """Empty when it is not from the hub."""

    def files(self) -> list[Path]:
        """What belongs to an exported model as it is: tokenizer, chat template, generation config, license."""
        templates = self.folder / layout.CHAT_TEMPLATES
        found = [file for file in self.folder.iterdir() if file.is_file() and layout.is_copied(file.name)]
        return sorted(found + (list(templates.glob("*.jinja")) if templates.is_dir() else []))

    def config(self) -> str:
        """Text of its config.json."""
        return (self.folder / layout.CONFIG).read_text(encoding="utf-8")

    def tensor_names(self) -> frozenset[str] | None:
        """Names of the tensors in its safetensors files; None when it has none, or they are not on this machine."""
        index, single = self.folder / layout.INDEX, self.folder / layout.SINGLE
        if index.is_file():
            return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not single.is_file():
            return None
        with safe_open(single, framework="np") as file:
            return frozenset(file.keys())


def find(path: str) -> StartingModel:
    """The model of `model.path`. The small files of a hub id are fetched unless they are here. Raises UserError."""
    refuse_no_model(path)
    if (folder := Path(path)).exists():
        cached = next((match for part in folder.absolute().parts if (match := _CACHED.fullmatch(part))), None)
        hub_id = f"{cached[1]}/{cached[2]}" if cached else ""
        return StartingModel(folder, hub_id.rpartition("/")[2] or folder.resolve().name, hub_id)
    return StartingModel(_of_the_hub(path), path.rpartition("/")[2], path)


def _of_the_hub(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))  # as the run left it in the cache
    except Exception:  # the hub has many errors; the next call says the one that counts
        ignored = [f"*{suffix}" for suffix in layout.WEIGHTS]
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=ignored))
    except Exception as error:
        raise UserError(
            f"model.path: the config and the tokenizer of {hub_id} are not in the cache of this machine and cannot be "
            f"fetched ({sentence(error)}): name a copy with RUN.toml --model.path=FOLDER",
            ExitCode.UNAVAILABLE,
        ) from None
