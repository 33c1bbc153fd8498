"""An exported version equals the stored version bit for bit, and runs export their last version."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.files import write
from palimpsest.common.service import Server, Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.rescore import Models
from palimpsest.services.learner.__main__ import body
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.learner_parts.models import load as load_plain, perturb
from tests.processes.programs import ProgramResult, run_program
from tests.runs.run_process import scripted
from tests.runs.scripted_worker import ScriptedWorker
from tests.servers.minio_stores import BUCKET, Store, put, some, tamper
from tests.servers.stored_weights import flip
from tools.backends.minio import Minio
from tools.backends.ports import free

pytestmark = pytest.mark.servers
VERSIONS = 3
RUN = """
run.folder = "{folder}"
model.path = "{model}"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
snapshot_store.storage = "s3"
snapshot_store.endpoint = "{endpoint}"
snapshot_store.bucket = "{bucket}"
snapshot_store.prefix = "{prefix}"
"""


@pytest.fixture(scope="module", params=["tied", "untied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with the learner in this process and scripted trajectories."""
    model: Path = request.getfixturevalue("starting_model" if request.param == "tied" else "untied_model")
    folder = tmp_path_factory.mktemp("exported")
    app = create_app(DiskStorage(folder / "first" / "snapshots"), sweep_s=3600)
    with Server(app, "127.0.0.1", 0, key="snapshot_store") as store:
        flags = (
            "--run.id=first", "--learner.proximal.kind=bypass", "--learner.groups_per_batch=2", "--learner.port=0",
            f"--snapshot_store.port={store.port}", "--learner.checkpoint.keep=1000", "--learner.optimizer.lr=1e-2",
        )  # fmt: skip
        invocation = load([str(scripted(folder, model, versions=VERSIONS)), *flags], {}, program="")
        write(invocation.config.run.home / "run.toml", to_toml(invocation.config).encode())
        with ScriptedWorker(invocation.config):
            body(invocation, Stop())
    return invocation.config.run.home


def export(*words: str | Path) -> ProgramResult:
    return run_program("palimpsest", "export", *words)


@torch.no_grad()
def logprobs(model: torch.nn.Module) -> torch.Tensor:
    """Log-prob of every token of three rows, given the earlier tokens."""
    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])


def loaded(folder: Path) -> torch.nn.Module:
    """Load the model with plain transformers."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def test_log_probs_equal_the_stored_version(run: Path, tmp_path: Path) -> None:
    """The test reads the stored versions with code independent of the export."""
    model = load([str(run / "run.toml")], {}, program="").config.model.path
    stored, seen = Models(run / "snapshots", model, "eager"), []
    for version in (0, 1, VERSIONS):
        done = export(run, f"--version={version}", tmp_path / str(version))
        assert (done.code, done.err) == (0, "")
        exported = loaded(tmp_path / str(version))
        assert exported.dtype == torch.bfloat16
        seen.append(logprobs(exported))
        assert torch.equal(seen[-1], logprobs(stored(version)))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], logprobs(loaded(Path(model)))), "version 0 is the starting model"


def test_the_folder_has_the_tensors_and_the_tokenizer_of_the_starting_model(run: Path, tmp_path: Path) -> None:
    model = Path(load([str(run / "run.toml")], {}, program="").config.model.path)
    assert export(run, tmp_path / "out").code == 0
    names = []
    for folder in (model, tmp_path / "out"):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert names[0] == names[1]
    own, exported = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    messages = [{"role": "user", "content": "How many?"}]
    assert exported.apply_chat_template(messages, tokenize=False) == own.apply_chat_template(messages, tokenize=False)
    assert exported("How many?").input_ids == own("How many?").input_ids
    assert "| trained tokens | unknown" not in (tmp_path / "out" / "README.md").read_text()


def test_a_flipped_byte_is_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "first"))
    largest = max((copy / "snapshots" / "objects").iterdir(), key=lambda path: path.stat().st_mtime)
    flip(largest, 1000)
    config = (copy / "run.toml").read_text()
    assert str(run) not in config, "the export must read the copy"
    done = export(copy, tmp_path / "out")
    assert (done.code, done.out) == (4, "")
    assert f"object {largest.name}, in {copy / 'snapshots'}" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]


@pytest.fixture
def store(minio_server: Minio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("MINIO_ACCESS_KEY", minio_server.access_key)
    monkeypatch.setenv("MINIO_SECRET_KEY", minio_server.secret_key)
    with ExitStack() as stack:
        yield stack.enter_context(Store(minio_server, claims_keep_s=3600.0))


def test_a_version_is_exported_from_a_bucket_while_the_store_runs(
    store: Store, starting_model: Path, tmp_path: Path
) -> None:
    model = load_plain(starting_model)
    perturb(model, by=0.05, seed=1)
    with SnapshotClient(store.url) as client:
        put(client, 0, some(0))
        manifest = put(client, 1, list(raw_tensors(named_weights(model))))
    (tmp_path / "run.toml").write_text(
        RUN.format(
            folder=tmp_path, model=starting_model, endpoint=store.minio.endpoint, bucket=BUCKET, prefix=store.prefix
        )
    )
    done = export(tmp_path / "run.toml", "--run.id=t", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[:2] == [
        f"version 1 of run t: {len(manifest.tensors)} tensors, 234,240 bytes", f"digest: {manifest.digest}",
    ]  # fmt: skip
    assert torch.equal(logprobs(loaded(tmp_path / "out")), logprobs(model))
    unknown = export(tmp_path / "run.toml", "--run.id=t", "--version=7", tmp_path / "more")
    assert unknown.code == 2
    assert f"{BUCKET}/{store.prefix}. There are 0, 1" in unknown.err
    tamper(store, manifest, lambda held: held[:999] + bytes([held[999] ^ 1]) + held[1000:])
    damaged = export(tmp_path / "run.toml", "--run.id=t", tmp_path / "more")
    assert damaged.code == 4
    assert f"object {manifest.object}, in " in damaged.err
    assert not (tmp_path / "more").exists()


def test_an_unreachable_store_gives_an_error_message(
    starting_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIO_ACCESS_KEY", "another")
    monkeypatch.setenv("MINIO_SECRET_KEY", "something")
    closed = f"http://127.0.0.1:{free()}"
    (tmp_path / "run.toml").write_text(
        RUN.format(folder=tmp_path, model=starting_model, endpoint=closed, bucket=BUCKET, prefix="t/")
    )
    done = export(tmp_path / "run.toml", "--run.id=t", tmp_path / "out")
    assert (done.code, done.out) == (3, "")
    assert closed.removeprefix("http://") in done.err
    assert "Traceback" not in done.err
