"""Check a recorded run's old log-probs with plain transformers, and nothing of Palimpsest's own code.

    palimpsest rescore runs/ID [--model FOLDER] [--every 10]

The run must have been recorded (learner.record = true), and its store must still hold the versions: keep them with
learner.checkpoint.keep = learner.versions. For every trained token that has an old log-prob: load the version that
sampled it, as stored, into a plain `AutoModelForCausalLM`, and score the token

    alone         its trajectory as one row without padding: how far do layouts differ?
    same layout   the rows the learner put together: must be equal bit for bit

Versions in a bucket are copied out of it first, with the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

Prints one JSON line: tokens, versions, alone_mean_abs and alone_max_abs (nats), same_layout_unequal (tokens, must be
0), and by staleness the mean |exact - behavior| beside what the current weights would give in the old ones' place.
"""

import argparse
import json
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import zstandard
from minio import Minio
from minio.credentials.providers import EnvAWSProvider
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

UNTRAINABLE = -1


class Lacking(Exception):
    """There is nothing to compare."""


def command(words: Sequence[str]) -> None:
    """Compare, and print one JSON line. Exits with 2 for arguments that cannot be used."""
    arguments = argparse.ArgumentParser(
        prog="palimpsest rescore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--model", help="default: model.path of the run")
    arguments.add_argument("--every", type=int, default=1, help="look at every n-th recorded version only")
    options = arguments.parse_args(words)
    if options.every < 1:
        arguments.error(f"--every {options.every}: a number above 0 is wanted")
    if not (options.run / "run.toml").is_file():
        arguments.error(f"{options.run}: not the folder of a run (it has no run.toml)")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    config = tomllib.loads((options.run / "run.toml").read_text())
    path, attention = options.model or config["model"]["path"], config["model"]["attention"]
    with tempfile.TemporaryDirectory() as folder:
        store = snapshots(options.run, config, Path(folder))
        try:
            compared = rescore(options.run / "records", Models(store, path, attention), options.every)
        except Lacking as lacking:
            arguments.error(str(lacking))
    print(json.dumps(compared))


def snapshots(run: Path, config: dict[str, Any], folder: Path) -> Path:
    """Where the run's versions can be read: its own folder, or a copy of what is in its bucket."""
    store = config["snapshot_store"]
    if store["storage"] == "folder":
        return Path(store.get("folder") or run / "snapshots")
    endpoint = urlsplit(store["endpoint"])
    client = Minio(
        endpoint.netloc, secure=endpoint.scheme == "https", region=store["region"], credentials=EnvAWSProvider()
    )
    prefix = store["prefix"] or f"{config['run']['id']}/"
    for kind in ("versions/", "objects/"):
        for found in client.list_objects(store["bucket"], prefix + kind, recursive=True):
            client.fget_object(store["bucket"], found.object_name, str(folder / found.object_name[len(prefix) :]))
    return folder


class Models:
    """Stored versions as plain models, one at a time in memory."""

    def __init__(self, store: Path, path: str, attention: str) -> None:
        self._store, self._path, self._attention = store, path, attention
        self._loaded: tuple[int, Any] | None = None

    def __call__(self, version: int) -> Any:
        """The model with this version's weights."""
        if self._loaded is None or self._loaded[0] != version:
            self._loaded = (version, self._load(version))
        return self._loaded[1]

    def _load(self, version: int) -> Any:
        kept = self._store / "versions" / f"{version:08d}.json"
        if not kept.is_file():
            raise Lacking(
                f"version {version}, which sampled recorded tokens, is not in {self._store} any more: run with "
                f"learner.checkpoint.keep = learner.versions, which keeps them all"
            )
        manifest = json.loads(kept.read_text())["manifest"]
        blob = (self._store / "objects" / manifest["object"]).read_bytes()
        tensors = {entry["name"]: decode(entry, blob) for entry in manifest["tensors"]}
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.from_pretrained(self._path).save_pretrained(folder)
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, attn_implementation=self._attention
            ).eval()


def decode(entry: dict[str, Any], blob: bytes) -> torch.Tensor:
    """A stored tensor: one zstd frame with the bytes of equal significance together."""
    dtype = getattr(torch, entry["dtype"])
    frame = blob[entry["start"] : entry["start"] + entry["length"]]
    planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), dtype=np.uint8)
    raw = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T)
    return torch.from_numpy(raw.reshape(-1).copy()).view(dtype).reshape(entry["shape"])


@torch.no_grad()
def score(model: Any, tokens: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """log pi of every token given those before it; [rows, length], 0 for the first."""
    rows = torch.from_numpy(tokens)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    logprobs = (logits / torch.from_numpy(temperatures)[:, :, None]).log_softmax(-1)
    chosen = logprobs.gather(-1, rows[:, 1:, None])[..., 0].numpy()
    return np.concatenate([np.zeros((len(tokens), 1), dtype=np.float32), chosen], axis=1)


def rescore(records: Path, models: Models, every: int = 1) -> dict[str, Any]:
    """Compare every recorded token. Raises Lacking."""
    if not any(records.glob("*.npz")):
        raise Lacking(f"{records} holds no batch: record the run with learner.record = true")
    alone: list[np.ndarray] = []
    unequal, versions = 0, set()
    exact, recomputed = defaultdict(list), defaultdict(list)
    for batch in batches(records, every):
        present = sorted(set(np.unique(batch["versions"]).tolist()) - {UNTRAINABLE})
        versions.update(present)
        for version in present:
            own = (batch["versions"] == version) & batch["exact"]
            rows = np.flatnonzero((batch["versions"] == version).any(axis=1))  # as the learner put them together
            lengths = batch["lengths"][rows]
            together = score(models(version), batch["tokens"][rows, : lengths.max()], batch["temperatures"][rows])
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                chosen = own[row, :length]
                if not chosen.any():
                    continue
                recorded = batch["proximal"][row, :length][chosen]
                single = score(models(version), batch["tokens"][row : row + 1, :length], batch["temperatures"][[row]])
                alone.append(np.abs(single[0][chosen] - recorded))
                unequal += int((together[i, :length][chosen] != recorded).sum())
                staleness = int(batch["now"]) - version
                behavior = batch["behavior"][row, :length][chosen]
                exact[staleness].append(np.abs(together[i, :length][chosen] - behavior))
                if batch["first"]:
                    recomputed[staleness].append(np.abs(batch["current"][row, :length][chosen] - behavior))
    if not alone:
        raise Lacking(f"no token in {records} has an old log-prob: a surrogate stood in the proximal's place")
    differences = np.concatenate(alone)
    return {
        "tokens": len(differences),
        "versions": len(versions),
        "alone_mean_abs": float(differences.mean()),
        "alone_max_abs": float(differences.max()),
        "same_layout_unequal": unequal,
        "exact_discrepancy": means(exact),
        "current_recompute_discrepancy": means(recomputed),
    }


def batches(records: Path, every: int) -> Iterator[dict[str, Any]]:
    """Micro-batches of the recorded versions, in order."""
    for path in sorted(records.glob("*.npz"))[::every]:
        with np.load(path) as file:
            for i in range(sum(name.startswith("tokens_") for name in file.files)):
                yield {
                    "now": file["now"],
                    **{
                        name: file[f"{name}_{i}"]
                        for name in (
                            "tokens", "versions", "behavior", "proximal", "current", "temperatures", "lengths", "first",
                            "exact",
                        )
                    },
                }  # fmt: skip


def means(by_staleness: dict[int, list[np.ndarray]]) -> dict[str, float]:
    """The mean in nats at each staleness, lowest first; JSON has strings for keys."""
    return {str(s): float(np.concatenate(parts).mean()) for s, parts in sorted(by_staleness.items())}
