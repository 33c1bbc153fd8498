"""Versions as deltas: bytes stored, time to encode, time to move a copy, memory.

    .venv/bin/python -m bench snapshots [--versions 64] [--rates 1e-6 1e-5 1e-4 2e-3] [--hidden 384] [--layers 9]
        [--stall-tokens 256 2048]

For each learning rate, a Qwen3 model with random weights takes AdamW steps, on random tokens or with --gradients random
on normal gradients (without a forward pass). The TrainablePolicy of the learner holds the float32 masters; each step
ends with a version. Each version goes to a real store on a folder, through the learner's client and with its choice
between delta and base, and none is removed: all versions count.

    full copies    the raw bytes of each version
    as built       each tensor whole, as planes compressed with zstd at level 3, before deltas (codec.encode_base);
                   measured on the first version
    EWMA           a float32 average and a copy in the model's dtype (proximal/surrogates/ewma_prox.py)
    ours           the objects in the store, bases included, and the manifests

    stored_ratio              full copies / ours
    bytes_per_changed_weight  bytes of the deltas / bf16 weights that changed
    resident_ratio_to_ewma    bytes of the tensors that live once the shadow copy has moved / once EWMA has scored;
                              `_bf16_average`: against an average in bf16 that is itself the copy
    hop_speedup               wall time to load a version as built / of one hop, with all digests, from bytes in memory;
                              `_with_download`: of a hop that also downloads; `_processor`: of processor time
    raw_map                   copying a version from a raw memory map into the model, without a digest
    encode_mb_per_s_core      raw bytes of the versions stored as deltas / processor seconds of their encoding, digests
                              included
    publish_stall_share       time of a version with publishing / without, minus 1, if it is on the training path
    stall                     the same measured in turns, without canaries: inline, and in a thread beside the passes,
                              for versions with the tokens of --stall-tokens; always with passes of the model

Prints one JSON line: settings, a list of cases, and the values of the first rate at the top level.
"""

import argparse
import copy
import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.load_as_built import as_built, medians, now, since
from bench.publish_stall import publish_stall
from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.service import Server
from palimpsest.common.snapshots.ahead import FetchAhead
from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.client import ParentWeights, RawTensor, SnapshotClient
from palimpsest.common.snapshots.encoding import encode_version
from palimpsest.common.snapshots.manifest import Manifest, Parent, seal
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import EditableModel, named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage

PASS_TOKENS = 256
"""Most tokens of each of the two rows of a pass, where a version has more."""
HOPS = 6
"""Hops, and encodings on one thread, that are timed."""


def main(words: Sequence[str]) -> dict[str, Any]:
    """Measure every learning rate. Returns the result."""
    arguments = argparse.ArgumentParser(
        prog="python -m bench snapshots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--versions", type=int, default=64)
    arguments.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 2e-3])
    arguments.add_argument("--hidden", type=int, default=384)
    arguments.add_argument("--layers", type=int, default=9)
    arguments.add_argument("--vocabulary", type=int, default=32000)
    arguments.add_argument("--tokens", type=int, default=256, help="tokens of a step")
    arguments.add_argument("--stall-tokens", type=int, nargs="+", default=[256, 2048], help="tokens of a version")
    arguments.add_argument("--gradients", choices=("model", "random"), default="model")
    options = arguments.parse_args(words)
    cases = [_case(rate, options) for rate in options.rates]
    top = (
        "stored_ratio",
        "bytes_per_changed_weight",
        "hop_speedup",
        "hop_speedup_with_download",
        "hop_speedup_processor",
        "encode_mb_per_s_core",
        "publish_stall_share",
    )
    return {
        "bench": "snapshots",
        "versions": options.versions,
        "threads": torch.get_num_threads(),
        **{name: cases[0][name] for name in top},
        **{name: cases[0][name] for name in ("parameters", "resident_ratio_to_ewma", "resident_ratio_to_bf16_average")},
        "cases": cases,
    }


def _model(options: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=options.layers,
        intermediate_size=4 * options.hidden, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: torch.nn.Module = Qwen3ForCausalLM(config).to(torch.bfloat16)
    return model


def _case(rate: float, options: argparse.Namespace) -> dict[str, Any]:
    model = _model(options)
    policy = TrainablePolicy(model, OptimizerConfig(lr=rate))
    tokens = torch.Generator().manual_seed(1)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="palimpsest-bench-"))
        stack.callback(shutil.rmtree, folder)
        server = stack.enter_context(
            Server(create_app(DiskStorage(folder), sweep_s=1e6), "127.0.0.1", 0, key="snapshot_store")
        )
        store = stack.enter_context(SnapshotClient(f"http://127.0.0.1:{server.port}"))
        versions = _Published(store)
        steps, publishes = [], []

        def model_passes(count: int) -> None:
            batch = torch.randint(options.vocabulary, (2, count // 2), generator=tokens)
            for part in torch.split(batch, PASS_TOKENS, dim=1):
                model(input_ids=part, labels=part).loss.backward()

        def passes() -> None:
            if options.gradients == "model":
                model_passes(options.tokens)
            else:
                for gradient in policy.gradients():
                    gradient.normal_(std=1e-3, generator=tokens)

        for version in range(options.versions):
            began = time.perf_counter()
            if version:
                passes()
                policy.step()
            trained = time.perf_counter()
            published_s = versions.publish(Version(version), model)
            if version:
                steps.append(trained - began)
                publishes.append(published_s)
        with_download = versions.hops(_model(options), ahead=False)
        hops = versions.hops(_model(options), ahead=True)
        resident = versions.resident(model, policy)
        stall = {
            count: publish_stall(
                partial(model_passes, count), lambda: policy.step(), lambda: _copied(model), versions.store_next
            )
            for count in options.stall_tokens
        }
    raw = versions.raw_bytes
    built = as_built(versions.last, model)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "learning_rate": rate,
        "parameters": parameters,
        "changed_share": round(mean(versions.shares), 5),
        "changed_share_first_to_last": [round(versions.shares[0], 5), round(versions.shares[-1], 5)],
        "bases": versions.bases,
        "full_bytes": raw * options.versions,
        "as_built_bytes": built["bytes"] * options.versions,
        "stored_bytes": versions.stored,
        "stored_ratio": round(raw * options.versions / versions.stored, 2),
        "stored_ratio_to_as_built": round(built["bytes"] * options.versions / versions.stored, 2),
        "bytes_per_changed_weight": versions.bytes_per_changed(),
        "encode_mb_per_s_core": versions.encode_rate(),
        "base_mb_per_s_core": round(raw / 1e6 / versions.base_seconds),
        "hop": (hop := medians(hops)),
        "load_as_built": built["load"],
        "raw_map": built["raw_map"],
        "hop_speedup": round(built["load"]["wall_s"] / hop["wall_s"], 2),
        "hop_with_download": (slow := medians(with_download)),
        "hop_speedup_with_download": round(built["load"]["wall_s"] / slow["wall_s"], 2),
        "hop_speedup_processor": round(built["load"]["processor_s"] / hop["processor_s"], 2),
        "resident_ratio_to_ewma": round(resident["shadow"] / resident["ewma"], 3),
        "resident_ratio_to_bf16_average": round(resident["shadow"] / resident["bf16_average"], 3),
        "resident_bytes": resident,
        "publisher_copy_bytes": raw,
        "version_s": round(median(steps), 4),
        "publish_s": round(median(publishes), 4),
        "publish_stall_share": round(median(publishes) / median(steps), 4),
        "stall": stall,
    }


def _copied(model: torch.nn.Module) -> list[RawTensor]:
    return [replace(tensor, raw=tensor.raw.copy()) for tensor in raw_tensors(named_weights(model))]


class _Published:
    """Publishes versions as the learner does, and counts."""

    def __init__(self, store: SnapshotClient) -> None:
        self._store, self._writer = store, Writer(store)
        self._writer.begin()
        self._parent: ParentWeights | None = None
        self.shares: list[float] = []
        self.stored = self.bases = self.raw_bytes = 0
        self._deltas: list[tuple[int, int, float]] = []
        self.base_seconds = 0.0
        self.last: list[RawTensor] = []
        self._newest = Version(0)

    def publish(self, version: Version, model: torch.nn.Module) -> float:
        """Store the model's weights; see Publisher. Returns the seconds, without those of the counts."""
        began, parent = time.perf_counter(), self._parent
        manifest = self._put(version, weights := _copied(model))
        seconds = time.perf_counter() - began
        self.raw_bytes = sum(len(tensor.raw) for tensor in weights)
        self.stored += manifest.object_size + len(seal(manifest))
        self.bases += manifest.parent is None
        self._count(weights, parent, delta=manifest.object_size if manifest.parent else None)
        self.last = weights
        return seconds

    def store_next(self, weights: list[RawTensor]) -> None:
        """Store a version that the counts leave out."""
        self._put(Version(self._newest + 1), weights)

    def _put(self, version: Version, weights: list[RawTensor]) -> Manifest:
        parent = self._parent
        manifest = self._store.put("bench", version, weights, (), writer=self._writer.epoch, parent=parent)
        cost = (parent.cost if parent else ChainCost(manifest.object_size)).after(manifest)
        own = {tensor.name: tensor.raw for tensor in weights}
        self._parent, self._newest = ParentWeights(Parent(version, manifest.digest), own, cost), version
        return manifest

    def _count(self, weights: list[RawTensor], parent: ParentWeights | None, *, delta: int | None) -> None:
        """Count the changed weights, and time the encoding again on one thread for the first versions."""
        began = time.process_time()
        if parent is None:
            with tempfile.TemporaryFile() as file:
                encode_version(weights, None, file, level=3, threads=1)
            self.base_seconds = time.process_time() - began
            return
        changed = sum(
            int(np.count_nonzero(tensor.raw.view(np.uint16) != parent.raw[tensor.name].view(np.uint16)))
            for tensor in weights
        )
        self.shares.append(changed / (self.raw_bytes / 2))
        if delta is None:
            return
        seconds = 0.0
        if len(self._deltas) < HOPS:
            began = time.process_time()
            with tempfile.TemporaryFile() as file:
                encode_version(weights, parent.raw, file, level=3, threads=1)
            seconds = time.process_time() - began
        self._deltas.append((delta, changed, seconds))

    def bytes_per_changed(self) -> float | None:
        """Bytes of all deltas for each weight that they change; None without a delta."""
        changed = sum(each[1] for each in self._deltas)
        return round(sum(each[0] for each in self._deltas) / changed, 3) if changed else None

    def encode_rate(self) -> int | None:
        """Raw MB for each processor second of encoding a delta; None without a delta."""
        timed = [each[2] for each in self._deltas if each[2]]
        return round(self.raw_bytes / 1e6 / median(timed)) if timed else None

    def resident(self, model: torch.nn.Module, policy: TrainablePolicy) -> dict[str, int]:
        """Bytes of the tensors that the shadow copy, EWMA and an average in bf16 add to the process."""
        found = {}
        with torch.no_grad():
            masters = [master.detach() for master in policy.masters]
        before = _live_bytes()
        kept = VersionedModel(copy.deepcopy(model).requires_grad_(False), self._store)
        kept.load_version(self._newest)
        found["shadow"] = _live_bytes() - before
        del kept
        ewma = EwmaProx(model, masters, torch.device("cpu"), decay=0.9)
        ewma._shadow.with_weights(ewma.average.means)
        found["ewma"] = _live_bytes() - before
        del ewma
        average = [master.to(torch.bfloat16) for master in masters]
        found["bf16_average"] = _live_bytes() - before
        del average
        return found

    def hops(self, model: torch.nn.Module, *, ahead: bool) -> list[tuple[float, float]]:
        """Wall and processor seconds of hops back from the newest version. ahead: without the download of the delta."""
        source = FetchAhead(self._store)
        walker, seconds = Walker(source, EditableModel(model)), []
        walker.move(self._newest)
        for version in range(self._newest - 1, max(-1, self._newest - 1 - HOPS), -1):
            if ahead:
                source.begin(Version(version + 1), Version(version))
                source.wait()
            began = now()
            walker.move(Version(version))
            seconds.append(since(began))
        return seconds


def _live_bytes() -> int:
    """Bytes of the storages of all tensors of this process."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):  # isinstance would make objects of torch.distributed warn
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())
