"""The starting model of a run: its folder, the files that an export copies, the names of its tensors."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from palimpsest.common.model_path import refuse_no_model, sentence
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.export import layout

TOOL_USE = "tool_use"
"""The name that transformers gives the template of dialogues with tools."""
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""Name of a model folder in the cache of the hub."""


@dataclass(frozen=True, slots=True)
class StartingModel:
    """Folder and name of a starting model."""

    folder: Path
    name: str
    hub_id: str
    """Empty for a local model."""

    def files(self) -> list[Path]:
        """Return the files that an export copies: tokenizer, chat template, generation config, license."""
        templates = self.folder / layout.CHAT_TEMPLATES
        found = [file for file in self.folder.iterdir() if file.is_file() and layout.is_copied(file.name)]
        return sorted(found + (list(templates.glob("*.jinja")) if templates.is_dir() else []))

    def has_tool_template(self) -> bool:
        """Return whether the tokenizer has a separate template for dialogues with tools: a run renders all with it."""
        if (self.folder / layout.CHAT_TEMPLATES / f"{TOOL_USE}.jinja").is_file():
            return True
        config = self.folder / layout.TOKENIZER
        named = json.loads(config.read_text(encoding="utf-8")).get(layout.KEY) if config.is_file() else None
        return isinstance(named, list) and any(entry.get("name") == TOOL_USE for entry in named)

    def config(self) -> str:
        """Return the text of config.json."""
        return (self.folder / layout.CONFIG).read_text(encoding="utf-8")

    def tensor_names(self) -> frozenset[str] | None:
        """Return the tensor names of the safetensors files, or None if this machine has no such files."""
        index, single = self.folder / layout.INDEX, self.folder / layout.SINGLE
        if index.is_file():
            return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not single.is_file():
            return None
        with safe_open(single, framework="np") as file:
            return frozenset(file.keys())


def find(path: str) -> StartingModel:
    """Return the model of `model.path`. Downloads missing files of a hub id, without weights. Raises UserError."""
    refuse_no_model(path)
    if (folder := Path(path)).exists():
        cached = next((match for part in folder.absolute().parts if (match := _CACHED.fullmatch(part))), None)
        hub_id = f"{cached[1]}/{cached[2]}" if cached else ""
        return StartingModel(folder, hub_id.rpartition("/")[2] or folder.resolve().name, hub_id)
    return StartingModel(_of_the_hub(path), path.rpartition("/")[2], path)


def _of_the_hub(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))  # a run caches the files of its model
    except Exception:  # the next call raises the error to report
        ignored = [f"*{suffix}" for suffix in layout.WEIGHTS]
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=ignored))
    except Exception as error:
        raise UserError(
            f"model.path: the config and the tokenizer of {hub_id} are not in the cache of this machine and cannot be "
            f"fetched ({sentence(error)}): name a copy with RUN.toml --model.path=FOLDER",
            ExitCode.UNAVAILABLE,
        ) from None
