"""Files that an export writes, and errors, with a snapshot store in a folder."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.export.export import export
from palimpsest.run import finish
from palimpsest.services.report.named_run import named_run
from tests.processes.programs import run_program
from tests.processes.waiting import LIMIT_S, until
from tests.records.history_lines import a_line
from tests.records.stored_runs import a_run, put
from tests.runs.run_process import ROOT
from tests.servers.stored_weights import a_tensor, flip

CONFIG = '{"dtype": "float32", "text_config": {"dtype": "float32"}, "vocab_size": 8}'
COPIED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{ }",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": "{  }",
    "additional_chat_templates/tools.jinja": "tools",
    "LICENSE": "free",
}
"""Files of the starting model that an export copies."""


def tensors_of(seed: int) -> list[RawTensor]:
    """Return a version's tensors, of wide and narrow types."""
    return [
        a_tensor("embed.weight", "bfloat16", (8, 4), seed),
        a_tensor("norm", "float32", (3,), seed + 1),
        a_tensor("mask", "bool", (5,), seed + 2),
        a_tensor("head.weight", "bfloat16", (8, 5), seed + 3),
    ]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A starting model's folder without weights."""
    folder = tmp_path / "starting"
    for name, text in {**COPIED, "config.json": CONFIG, "README.md": "its own", "training_args.bin": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def home(tmp_path: Path, model: Path) -> Path:
    """A run with versions 3, 4 and 5."""
    home = a_run(tmp_path / "first", model)
    for version in (3, 4, 5):
        put(home, version, tensors_of(10 * version))
    lines = [a_line(version - 1) | {"tokens": 1000 * version} for version in (3, 4, 5)]
    (home / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def write(home: Path, folder: Path, version: int | None = None, *, shard_bytes: int = 10**9) -> None:
    config, _ = named_run([str(home)], {}, program="")
    export(config, home, folder, version=version, shard_bytes=shard_bytes)


def held(folder: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Name -> shape and bytes of each tensor of a model folder, as the safetensors library reads it."""
    return {
        name: (tuple(tensor["shape"]), bytes(tensor["data"]))
        for path in folder.glob("*.safetensors")
        for name, tensor in deserialize(path.read_bytes())
    }


def plain(tensors: list[RawTensor]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {tensor.name: (tensor.shape, tensor.raw.tobytes()) for tensor in tensors}


@pytest.mark.parametrize(("requested", "expected"), [(None, 5), (3, 3)])
def test_the_requested_or_the_newest_version_is_exported(
    home: Path, tmp_path: Path, requested: int | None, expected: int
) -> None:
    write(home, tmp_path / "out", requested)
    assert held(tmp_path / "out") == plain(tensors_of(10 * expected))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| version | {expected} |" in card
    assert f"| trained tokens | {sum(1000 * version for version in range(3, expected + 1)):,} |" in card


def test_a_finished_run_with_a_damaged_history_is_exported(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (home / "history.jsonl").open("a") as file:
        file.write("{}\n")
    config, _ = named_run([str(home)], {}, program="")
    with pytest.raises(UserError, match="The run is done, but there is no report: ") as error:
        finish(config)
    assert f"{home / 'history.jsonl'}, line 4: " in str(error.value)
    assert str(error.value).endswith(f" report {home}")
    assert error.value.code == ExitCode.DAMAGED
    assert capsys.readouterr().out == f"model: {home / 'model'} (version 5)\n"
    assert held(home / "model") == plain(tensors_of(50))


def test_other_files_are_copied_from_the_starting_model(home: Path, tmp_path: Path) -> None:
    write(home, tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files.keys() == {*COPIED, "config.json", "model.safetensors", "README.md"}
    assert {name: files[name].read_text() for name in COPIED} == COPIED
    config = json.loads(files["config.json"].read_text())
    assert config == {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vocab_size": 8}


def test_a_large_model_has_several_files_and_an_index(home: Path, tmp_path: Path) -> None:
    write(home, tmp_path / "out", shard_bytes=90)  # the head of 80 bytes does not fit into the first file
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {
        "metadata": {"total_size": 64 + 12 + 5 + 80},
        "weight_map": {"embed.weight": first, "norm": first, "mask": first, "head.weight": second},
    }
    assert held(tmp_path / "out") == plain(tensors_of(50))


def test_each_tensor_is_aligned_for_its_type(home: Path, tmp_path: Path) -> None:
    write(home, tmp_path / "out")
    body = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "BOOL": 1}
    assert header.pop("__metadata__") == {"format": "pt"}
    assert [(8 + length + one["data_offsets"][0]) % sizes[one["dtype"]] for one in header.values()] == [0, 0, 0, 0]


def test_an_unknown_version_is_refused_with_the_known_ones(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"version 9 of run first is not in .*snapshots\. There are 3, 4, 5; "):
        write(home, tmp_path / "out", 9)
    assert not (tmp_path / "out").exists()


def test_a_run_without_versions_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match="run new has published no version"):
        write(a_run(tmp_path / "new", model), tmp_path / "out")


def test_the_store_of_another_run_is_refused(home: Path, tmp_path: Path) -> None:
    put(home, 6, tensors_of(1), run="second")
    with pytest.raises(UserError, match="belongs to run second, not first"):
        write(home, tmp_path / "out")


@pytest.mark.parametrize("kind", ["flipped", "truncated", "lost", "manifest"])
def test_damage_is_reported_with_its_digest_and_leaves_no_file(home: Path, tmp_path: Path, kind: str) -> None:
    manifest = put(home, 6, tensors_of(60))
    path = home / "snapshots" / "objects" / manifest.object
    message = rf"object {manifest.object}, in .*snapshots: version 6"
    if kind == "flipped":
        flip(path, manifest.object_size // 2)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "lost":
        path.unlink()
    else:
        stands = home / "snapshots" / "versions" / "00000006.json"
        stands.write_bytes(stands.read_bytes().replace(b'"writer":1', b'"writer":2'))
        message = r"version 6 \(versions/00000006.json\), in .*snapshots: the manifest contradicts its seal"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        write(home, tmp_path / "out")
    assert error.value.code == ExitCode.DAMAGED
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("part", range(10))
def test_every_flipped_byte_of_an_object_is_detected(home: Path, tmp_path: Path, part: int) -> None:
    """This includes bytes that zstd ignores and that change no tensor."""
    manifest = put(home, 6, tensors_of(60))
    flip(home / "snapshots" / "objects" / manifest.object, part * (manifest.object_size - 1) // 9)
    with pytest.raises(UserError, match=f"object {manifest.object}, in ") as error:
        write(home, tmp_path / "out")
    assert error.value.code == ExitCode.DAMAGED


def test_an_export_does_not_replace_its_starting_model(home: Path, model: Path) -> None:
    config, _ = named_run([str(home)], {}, program="")
    (model / "README.md").write_text("---\ntags:\n- palimpsest\n---\n")  # as exported from an earlier run
    with pytest.raises(UserError, match="is the model that run first started from"):
        export(config, home, model, overwrite=True)
    assert (model / "config.json").read_text() == CONFIG


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_leaves_no_file(home: Path, tmp_path: Path) -> None:
    put(home, 6, [RawTensor("embed.weight", "uint8", (50_000,), np.zeros(50_000, dtype=np.uint8))])
    before = sorted(tmp_path.iterdir())
    with file_size_limit(20_000):
        done = run_program("palimpsest", "export", home, tmp_path / "out")
    assert (done.code, done.out) == (ExitCode.UNAVAILABLE, "")
    assert f"a file reached the size limit (ulimit -f) (writing {tmp_path / 'out'})" in done.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.thorough
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_export_leaves_no_file(home: Path, tmp_path: Path, sent: signal.Signals) -> None:
    path = home / "snapshots" / "objects" / put(home, 6, tensors_of(60)).object
    path.unlink()
    os.mkfifo(path)  # a pipe without a writer, so that the export blocks halfway
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "palimpsest", "export", home, tmp_path / "out"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob(".out.*.partial/model.safetensors")) != [], "a folder half-written")
    process.send_signal(sent)
    _, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == ExitCode.INTERRUPTED, error
    assert sorted(tmp_path.iterdir()) == before


def test_an_impossible_folder_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_program("palimpsest", "export", home, tmp_path / "file" / "out")
    assert done.code == ExitCode.CONFIGURATION
    assert "file cannot be used: there is a file where a folder is needed" in done.err


def test_the_command_prints_version_digest_and_folder(home: Path, tmp_path: Path) -> None:
    done = run_program("palimpsest", "export", home, "--version", "4", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    first_line, digest, where = done.out.splitlines()
    assert first_line == "version 4 of run first: 4 tensors, 161 bytes"
    assert digest.removeprefix("digest: ") in (tmp_path / "out" / "README.md").read_text()
    assert where == f"model: {tmp_path / 'out'}"


def test_a_run_file_and_keys_may_name_the_run(home: Path, model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "moved")
    gone = run_program("palimpsest", "export", home, tmp_path / "out")
    assert gone.code == ExitCode.CONFIGURATION
    assert "model.path: " in gone.err
    moved = f"--model.path={tmp_path / 'moved'}"
    refused = run_program("palimpsest", "export", home, moved, tmp_path / "out")
    assert f"a configuration key needs a run file: palimpsest export {home / 'run.toml'} {moved} ..." in refused.err
    done = run_program("palimpsest", "export", home / "run.toml", moved, "--version=3", tmp_path / "out")
    assert done.code == 0, done.err
    assert held(tmp_path / "out") == plain(tensors_of(30))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "usage: palimpsest export"),
        (["runs/a"], "palimpsest export takes a run and a folder; got: runs/a"),
        (["a", "b", "c"], "palimpsest export takes a run and a folder; got: a b c"),
        (["a", "b", "--version"], "--version : must be a version number"),
        (["a", "b", "--version=last"], "--version last: must be a version number"),
        (["a", "b", "--overwite"], "palimpsest export --overwite: there is no such flag"),
        (["nothing", "b"], "nothing: not the folder of a run"),
    ],
)
def test_invalid_arguments_are_refused(words: list[str], error: str, tmp_path: Path) -> None:
    done = run_program("palimpsest", "export", *words)
    assert (done.code, done.out) == (ExitCode.CONFIGURATION, "")
    assert done.err.startswith(error)
