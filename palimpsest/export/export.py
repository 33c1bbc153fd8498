"""Copies a version from the store of a run to a folder that transformers and vLLM load."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from palimpsest import __version__
from palimpsest.common import run_folder
from palimpsest.common.config.schema import Model, RunConfig
from palimpsest.common.files import with_filename, write
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.user_error import UserError
from palimpsest.export import layout
from palimpsest.export.adapter import write_adapter, write_merged
from palimpsest.export.converted import write_converted
from palimpsest.export.model_card import Form, Provenance, model_card
from palimpsest.export.new_folder import new_folder, refuse_occupied
from palimpsest.export.safetensors_file import SafetensorsFile
from palimpsest.export.starting_model import StartingModel, find
from palimpsest.export.stored_version import StoredVersions
from palimpsest.services.report.folder import history
from palimpsest.services.rollout.chat_renderer import ChatRenderer


@dataclass(frozen=True, slots=True)
class Exported:
    """Result of an export."""

    folder: Path
    run: str
    version: int
    digest: str
    tensors: int
    bytes: int
    """Size of all tensors."""


def export(
    config: RunConfig,
    home: Path,
    folder: Path,
    *,
    version: int | None = None,
    overwrite: bool = False,
    alone: bool = False,
    shard_bytes: int = layout.SHARD_BYTES,
) -> Exported:
    """Write a version (default: the newest) to `folder`. If an error occurs, `folder` is unchanged.

    home: folder of the run; its history has the number of trained tokens. alone: write the adapter that the version
    holds, without its base model; otherwise an adapter is merged into the base model. Raises UserError.
    """
    refuse_occupied(folder, overwrite=overwrite)
    starting = find(config.model.path)
    if folder.exists() and folder.samefile(starting.folder):
        raise UserError(f"{folder} is the model that run {config.run.id} started from: name another folder")
    with StoredVersions(config) as stored:
        manifest = stored.manifest(version)
        with new_folder(folder, overwrite=overwrite) as partial:
            form = _write_tensors(stored.tensors(manifest), manifest, starting, partial, limit=shard_bytes, alone=alone)
            _write_beside(config, home, manifest, starting, partial, name=folder.name or str(folder), form=form)
    return Exported(folder, config.run.id, manifest.version, manifest.digest, len(manifest.tensors), manifest.full_size)


def _write_tensors(
    tensors: Iterator[RawTensor],
    manifest: Manifest,
    starting: StartingModel,
    folder: Path,
    *,
    limit: int,
    alone: bool,
) -> Form:
    if isinstance(manifest.adapter, Adapter):
        if alone:
            write_adapter(tensors, manifest, manifest.adapter, starting, folder)
            return "adapter"
        write_merged(tensors, manifest.adapter, starting, folder, limit=limit)
        return "merged"
    if alone:
        raise UserError(f"version {manifest.version} holds whole weights: leave out --adapter")
    names = starting.tensor_names()
    if names is not None and not names >= {entry.name for entry in manifest.tensors}:
        write_converted(starting.folder, tensors, folder, limit=limit)
        return "whole"
    files = layout.shards(manifest.tensors, limit)
    if len(files) > 1:
        write(folder / layout.INDEX, layout.index(files).encode())
    with with_filename(folder), ExitStack() as stack:
        opened = {}
        for name, entries in files.items():
            file = stack.enter_context((folder / name).open("wb"))
            opened.update(dict.fromkeys((entry.name for entry in entries), SafetensorsFile(file, entries)))
        for tensor in tensors:
            opened[tensor.name].write(tensor)
        for written in set(opened.values()):
            written.sync()
    return "whole"


def _write_beside(
    config: RunConfig, home: Path, manifest: Manifest, starting: StartingModel, folder: Path, *, name: str, form: Form
) -> None:
    """Write all files except the tensors."""
    write_tokenizer(config.model, starting, folder)
    dtype = layout.main_dtype(manifest.tensors)
    if form != "adapter":
        write(folder / layout.CONFIG, layout.config_text(starting.config(), dtype).encode())
    made = Provenance(
        run=config.run.id,
        version=manifest.version,
        digest=manifest.digest,
        dtype=dtype,
        trained_tokens=_trained_tokens(home, manifest.version),
        recipe=config.learner.recipe,
        proximal=config.learner.proximal.kind,
        environments=config.tasks.environments,
        starting_model=starting.name,
        hub_id=starting.hub_id,
        palimpsest=__version__,
        form=form,
    )
    write(folder / layout.CARD, model_card(made, folder=name).encode())


def write_tokenizer(model: Model, starting: StartingModel, folder: Path) -> None:
    """Write tokenizer, generation config, license, and the chat template that the run rendered with.

    The starting model's files are unchanged if the run used its only template without options.
    """
    replaced = bool(model.chat_template or model.chat_template_options or starting.has_tool_template())
    for file in starting.files():
        place = folder / file.relative_to(starting.folder)
        if replaced and layout.is_template(file.name):
            continue
        if replaced and file.name == layout.TOKENIZER:
            write(place, layout.without_template(file.read_text(encoding="utf-8")).encode())
        else:
            write(place, file.read_bytes())
    if replaced:
        renderer = ChatRenderer.load(str(starting.folder), dict(model.chat_template_options), model.chat_template)
        write(folder / layout.CHAT_TEMPLATE, renderer.portable_template.encode())


def _trained_tokens(home: Path, version: int) -> int | None:
    """Return the tokens trained up to `version`, or None if the history is missing or unreadable."""
    if not (home / run_folder.HISTORY).is_file():
        return None
    try:
        counts: list[int] = [
            line["tokens"] for line in history(home / run_folder.HISTORY) if line["published"] <= version
        ]
    except UserError:
        return None  # the weights are intact; `palimpsest audit` reports the damage to the history
    return sum(counts)
