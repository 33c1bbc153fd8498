"""Recompute the old log-probs of a recorded run with plain transformers, without the code of the services.

For every trained token with an old log-prob: load the stored version that sampled the token into a plain
`AutoModelForCausalLM`, and score the token

    alone         with its trajectory as one row without padding: how much do batch layouts differ?
    same layout   with the rows of the learner's pass: the values must be equal bit for bit

A record names the pass of each token that the learner scored in the batch. Values that came with the row (replicas,
interruption, prefetch) have no such layout, and are compared alone only.

palimpsest/rescore_command.py is the command.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from minio import Minio
from minio.credentials.providers import EnvAWSProvider
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from palimpsest.common.base_model import base_digest
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.frames import Hashed, RawTensor, joined
from palimpsest.common.snapshots.manifest import Damaged, Manifest, unseal
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.rescore_attention import within_rows
from palimpsest.rescore_records import Lacking, micro_batches
from palimpsest.rescore_routing import given_experts

UNTRAINABLE = -1
TRAINING_PASS = -2
"""In records: the forward pass of the training gave the old log-prob."""
CHUNK_TOKENS = 1024
"""Default of learner.logprob_chunk_tokens."""


def main(run: Path, config: dict[str, Any], model: str | None, every: int) -> dict[str, Any]:
    """Return the comparison of a run folder with the configuration `config`. Raises Lacking, UserError for damage."""
    torch.set_num_threads(config.get("learner", {}).get("threads", 1))  # the order of sums depends on it
    logging.disable_progress_bar()
    path, attention = model or config["model"]["path"], config["model"]["attention"]
    learner = config.get("learner", {})
    chunk, packed = learner.get("logprob_chunk_tokens", CHUNK_TOKENS), learner.get("layout") == "packed"
    with tempfile.TemporaryDirectory() as folder:
        store = snapshots(run, config, Path(folder))
        engine = learner.get("routing_replay") == "engine"
        models = Models(store, path, attention, chunk, packed=packed)
        shared = learner.get("context_parallel", 1) > 1
        try:
            return rescore(run / "records", models, every, engine=engine, shared=shared)
        except Damaged as damage:
            raise UserError(f"{store}: {damage}. Restore the store from a copy", ExitCode.DAMAGED) from None


def snapshots(run: Path, config: dict[str, Any], folder: Path) -> Path:
    """Return the folder with the versions of the run. Versions in a bucket are copied to `folder` first."""
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
    """Loads stored versions as plain models. Memory holds one model at a time."""

    def __init__(
        self, store: Path, path: str, attention: str, chunk: int = CHUNK_TOKENS, *, packed: bool = False
    ) -> None:
        """chunk: learner.logprob_chunk_tokens of the run; packed: whether learner.layout is "packed"."""
        self._store, self._path, self._chunk, self.packed = store, path, chunk, packed
        self._attention = within_rows(attention) if packed else attention
        self._device = "cuda" if torch.cuda.is_available() else "cpu"  # as the learner on this machine
        self._loaded: tuple[int, Any] | None = None

    def __call__(self, version: int) -> Any:
        """Return the model with the weights of this version. Raises Lacking if the store does not hold it."""
        if self._loaded is None or self._loaded[0] != version:
            self._loaded = (version, self._load(version))
        return self._loaded[1]

    def manifest(self, version: Version) -> Manifest:
        """See VersionSource (common/snapshots/walker.py). Raises Lacking if the store does not hold the version."""
        file = self._store / "versions" / f"{version:08d}.json"
        if not file.is_file():
            raise Lacking(
                f"version {version}, which sampled recorded tokens, is not in {self._store}: record the run with "
                f"learner.checkpoint.every = 1 and learner.checkpoint.keep = learner.versions, or with "
                f"learner.checkpoint.every above learner.versions; both keep all versions"
            )
        try:
            return unseal(file.read_bytes())
        except Damaged as damage:
            raise Damaged(f"version {version} ({file.name}): {damage}") from None

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """See VersionSource. Compares the digest at the end of the block."""
        objects = self._store / "objects"
        hashed = Hashed(joined(manifest, lambda digest: iter([(objects / digest).read_bytes()])), manifest)
        try:
            yield hashed.chunks()
        except FileNotFoundError as error:
            raise Damaged(f"an object of version {manifest.version} is missing: {error.filename}") from None
        hashed.verify()

    def _load(self, version: int) -> Any:
        manifest = self.manifest(Version(version))
        with tempfile.TemporaryDirectory() as folder:
            raw = RawFile(Path(folder) / "weights.raw")
            Walker(self, raw).move(manifest.version)  # along the deltas from a base
            tensors = {tensor.name: torch_tensor(tensor) for tensor in raw.tensors(manifest)}
        if isinstance(manifest.adapter, Adapter):
            model = self._adapted(tensors, manifest.adapter)
        else:
            with tempfile.TemporaryDirectory() as folder:
                AutoConfig.from_pretrained(self._path).save_pretrained(folder)
                save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
                model = self._plain(folder)
        head = model.get_output_embeddings()
        head.forward = in_chunks(head.forward, self._chunk)
        return model.to(self._device)

    def _plain(self, folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=self._attention
        ).eval()

    def _adapted(self, tensors: dict[str, torch.Tensor], adapter: Adapter) -> Any:
        """The base model with an adapter, as peft loads it from a folder."""
        from peft import LoraConfig, PeftModel

        if base_digest(self._path) != adapter.base:
            raise Lacking(f"{self._path} is not the base model of the run: name it with --model")
        with tempfile.TemporaryDirectory() as folder:
            LoraConfig(
                r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets), task_type="CAUSAL_LM"
            ).save_pretrained(folder)
            save_file(tensors, Path(folder) / "adapter_model.safetensors")
            return PeftModel.from_pretrained(self._plain(self._path), folder, autocast_adapter_dtype=False).eval()


def torch_tensor(tensor: RawTensor) -> torch.Tensor:
    """Return a stored tensor, copied."""
    return torch.from_numpy(tensor.raw.copy()).view(getattr(torch, tensor.dtype)).reshape(tensor.shape)


def in_chunks(head: Callable[[torch.Tensor], torch.Tensor], chunk: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Apply the head to `chunk` positions at a time, as the learner does. Another size rounds differently."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        parts = [head(part) for part in torch.split(hidden.flatten(0, -2), chunk)]
        return torch.cat(parts).reshape(*hidden.shape[:-1], -1)

    return forward


@torch.no_grad()
def score(model: Any, tokens: np.ndarray, temperatures: np.ndarray, lengths: Sequence[int] | None = None) -> np.ndarray:
    """Return log pi of every token given the tokens before it, 0 for the first one. [rows, length], nats

    lengths: of packed rows. Padding gets 0.
    """
    if lengths is not None:
        return score_packed(model, tokens, temperatures, lengths)
    rows = torch.from_numpy(tokens).to(next(model.parameters()).device)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    logprobs = (logits / torch.from_numpy(temperatures).to(rows.device)[:, :, None]).log_softmax(-1)
    chosen = logprobs.gather(-1, rows[:, 1:, None])[..., 0].cpu().numpy()
    return np.concatenate([np.zeros((len(tokens), 1), dtype=np.float32), chosen], axis=1)


def score_packed(model: Any, tokens: np.ndarray, temperatures: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """`score` of rows one after another in one sequence, as the learner packs them."""
    device = next(model.parameters()).device
    starts = torch.tensor(np.concatenate(([0], np.cumsum(lengths))), dtype=torch.int32, device=device)
    together = np.concatenate([row[:length] for row, length in zip(tokens, lengths, strict=True)])
    packed = torch.from_numpy(together).to(device)
    places = torch.cat([torch.arange(length, device=device) for length in lengths])
    logits = model(
        input_ids=packed[None], position_ids=places[None],
        cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=max(lengths), max_length_k=max(lengths),
        use_cache=False,
    ).logits[0].float()  # fmt: skip
    scored = np.zeros(tokens.shape, dtype=np.float32)
    for row, (start, length) in enumerate(zip(starts[:-1].tolist(), lengths, strict=True)):
        own = logits[start : start + length - 1] / torch.tensor(temperatures[row], device=device)
        chosen = own.log_softmax(-1).gather(-1, packed[start + 1 : start + length, None])[:, 0]
        scored[row, 1:length] = chosen.cpu().numpy()
    return scored


def rescore(
    records: Path, models: Models, every: int = 1, *, engine: bool = False, shared: bool = False
) -> dict[str, Any]:
    """Compare the old log-prob of every recorded token. Raises Lacking if there is none.

    engine: whether passes besides the training's replay the recorded experts, too. shared: whether ranks shared the
    tokens of each row: no pass of one process has their layout.
    """
    if not any(records.glob("*.npz")):
        raise Lacking(f"{records} holds no batch: record the run with learner.record = true")
    alone: list[np.ndarray] = []
    same = unequal = 0
    versions: set[int] = set()
    exact, recomputed = defaultdict(list), defaultdict(list)
    for path in sorted(records.glob("*.npz"))[::every]:
        batches = micro_batches(path)
        present = sorted({int(v) for batch in batches for v in np.unique(batch["versions"])} - {UNTRAINABLE})
        versions.update(present)
        for version in present:
            own_passes = () if shared else passes(batches, version, engine=engine)
            for tokens, temperatures, recorded, lengths, routes in own_passes:
                of_rows = lengths if models.packed else None
                with given_experts(models(version), routes, of_rows):
                    scored = score(models(version), tokens, temperatures, of_rows)
                chosen = ~np.isnan(recorded)
                same, unequal = same + int(chosen.sum()), unequal + int((scored[chosen] != recorded[chosen]).sum())
            for batch in batches:
                own = (batch["versions"] == version) & batch["exact"]
                for row in np.flatnonzero(own.any(axis=1)):
                    length, chosen = batch["lengths"][row], own[row]
                    single = np.zeros(len(chosen), np.float32)
                    only = batch["tokens"][row : row + 1, :length]
                    routes = batch["routes"][[row], :length] if engine else None
                    of_row = [int(length)] if models.packed else None
                    with given_experts(models(version), routes):
                        single[:length] = score(models(version), only, batch["temperatures"][[row]], of_row)[0]
                    alone.append(np.abs(single[chosen] - batch["proximal"][row][chosen]))
                    staleness = int(batch["now"]) - version
                    behavior = batch["behavior"][row][chosen]
                    exact[staleness].append(np.abs(single[chosen] - behavior))
                    if batch["first"]:
                        recomputed[staleness].append(np.abs(batch["current"][row][chosen] - behavior))
    if not alone:
        raise Lacking(f"no token in {records} has an old log-prob: the run used a surrogate")
    differences = np.concatenate(alone)
    return {
        "tokens": len(differences),
        "versions": len(versions),
        "alone_mean_abs": float(differences.mean()),
        "alone_max_abs": float(differences.max()),
        "same_layout_tokens": same,
        "same_layout_unequal": unequal,
        "exact_discrepancy": means(exact),
        "current_recompute_discrepancy": means(recomputed),
    }


def passes(
    batches: list[dict[str, Any]], version: int, *, engine: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[int], np.ndarray | None]]:
    """Iterate over the learner's passes that gave old log-probs of this version.

    Yields tokens, temperatures, and the recorded values, NaN where the pass gave none; [rows, length] and [rows, 1];
    the tokens of each row; and the experts that were replayed, [rows, length, layers, experts of a token].
    """
    for batch in batches:  # the training's own passes: complete micro-batches
        own = (batch["passes"] == TRAINING_PASS) & (batch["versions"] == version) & batch["exact"]
        if own.any():
            yield (
                batch["tokens"], batch["temperatures"], np.where(own, batch["proximal"], np.nan),
                batch["lengths"].tolist(), batch["routes"],
            )  # fmt: skip
    rows = defaultdict(list)
    for batch in batches:
        own = (batch["versions"] == version) & batch["exact"]
        for number in sorted(set(batch["passes"][own].tolist())):
            if number < 0:
                continue
            of_pass = batch["passes"] == number
            for row in np.flatnonzero(of_pass.any(axis=1)):
                length = int(np.flatnonzero(of_pass[row])[-1]) + 1
                values = np.where(of_pass[row] & own[row], batch["proximal"][row], np.nan)[:length]
                rows[number].append((length, str(batch["trajectories"][row]), batch, row, values))
    for number in sorted(rows):
        together = sorted(rows[number], key=lambda each: each[:2])
        tokens = np.zeros((len(together), together[-1][0]), np.int64)
        recorded = np.full(tokens.shape, np.nan, np.float32)
        for i, (length, _, batch, row, values) in enumerate(together):
            tokens[i, :length], recorded[i, :length] = batch["tokens"][row, :length], values
        temperatures = np.concatenate([batch["temperatures"][[row]] for _, _, batch, row, _ in together])
        lengths = [length for length, *_ in together]
        yield tokens, temperatures, recorded, lengths, routes_of(together) if engine else None


def routes_of(together: list[tuple[int, str, dict[str, Any], int, np.ndarray]]) -> np.ndarray:
    """Return the experts that the rows of a pass replay, -1 in the padding."""
    first = together[0][2]["routes"]
    routes = np.full((len(together), together[-1][0], *first.shape[2:]), -1, first.dtype)
    for i, (length, _, batch, row, _) in enumerate(together):
        routes[i, :length] = batch["routes"][row, :length]
    return routes


def means(by_staleness: dict[int, list[np.ndarray]]) -> dict[str, float]:
    """Return the mean in nats for each staleness, lowest first. Keys are strings, as in JSON."""
    return {str(s): float(np.concatenate(parts).mean()) for s, parts in sorted(by_staleness.items())}
