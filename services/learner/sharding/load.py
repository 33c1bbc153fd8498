"""Build a sharded model. Each rank reads only its own shards of the weights from the safetensors files.

The model is first built without memory for its parameters (device "meta"), then split, and only then the shards get
memory. Its buffers, which no checkpoint holds, are computed as usual.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from palimpsest.common.config.learner import LOGPROB_CHUNK_TOKENS
from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.model_limits import refuse_attention, refuse_layout
from palimpsest.common.model_path import WHOLE, refuse_no_model, sentence
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.distributed import Context
from palimpsest.services.learner.model.checkpoint_names import PartNames, part_names
from palimpsest.services.learner.model.context import CONTEXT_ATTRIBUTE
from palimpsest.services.learner.model.critic import Valued
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.output_head import CHUNK_ATTRIBUTE, decoder_of, find_head
from palimpsest.services.learner.model.packing import PACKED, packed_attention, use_packing
from palimpsest.services.learner.sharding.local_shards import local_parts
from palimpsest.services.learner.sharding.pass_errors import PassErrors
from palimpsest.services.learner.sharding.sharded_model import ShardedModel, blocks_of, shard

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COMPUTES = torch.bfloat16
"""Type of the weights in a pass, and of the published weights."""
NO_ADAPTER = LoraConfig()
"""All weights are trained."""


class ModelFiles:
    """How to build a sharded copy of the model in a folder or of a hub id."""

    def __init__(
        self,
        path: str,
        attention: str,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        logprob_chunk_tokens: int = LOGPROB_CHUNK_TOKENS,
        layout: str = "padded",
        context: Context | None = None,
        lora: LoraConfig = NO_ADAPTER,
    ) -> None:
        """attention, logprob_chunk_tokens, layout, lora: keys of the run. context: ranks that share each row.

        Raises UserError if it cannot be sharded."""
        refuse_no_model(path)
        self._chunk, self._layout, self._context, self._lora = logprob_chunk_tokens, layout, context, lora
        self._path, self._attention, self._mesh, self._device = path, attention, mesh, device
        self._files = _tensor_files(path)
        self.errors = PassErrors()
        """Errors of passes without gradient, of all models built here."""
        self.names: dict[str, PartNames] = {}
        """The model's own name of each weight -> its names in the checkpoint; complete after the first `build`."""

    @property
    def adapted(self) -> bool:
        """Whether the models have an adapter. Their other weights get no gradients then."""
        return self._lora.rank > 0

    def build(self, *, holds: torch.dtype, trains: bool, offload: bool = False) -> ShardedModel:
        """Return the starting model, with a new adapter if the run trains one. holds: type of the shards. trains:
        whether the weights, or those of the adapter, get gradients. offload: the shards stay in the host's memory.

        All ranks must call it. Raises UserError.
        """
        causal = self._causal()
        model = self._split(causal, causal, holds=holds, trains=trains and not self.adapted, offload=offload)
        setattr(causal, CHUNK_ATTRIBUTE, self._chunk)
        model(find_head)  # recognized in the model's own precision
        if self._layout == PACKED:
            model(use_packing)
        self._share_rows(causal)
        self._adapt(causal, trains=trains)
        return model

    def _share_rows(self, module: nn.Module) -> None:
        """Let the passes of a model be those of ranks that share rows, if the run has such ranks."""
        if self._context is not None:
            setattr(module, CONTEXT_ATTRIBUTE, self._context)

    def _adapt(self, module: nn.Module, *, trains: bool) -> None:
        """Add a new adapter, whole on every rank, if the run trains one."""
        if self.adapted:
            with _plain_weights(module):
                add_adapter(module, self._lora)
            if not trains:
                module.requires_grad_(False)

    def build_valued(self) -> ShardedModel:
        """Return the starting model's decoder with a scalar head (model/critic.py), in float32 and with gradients. If
        the run trains an adapter: in bf16 without gradients, with a new adapter that has them.

        Head and adapter are whole on every rank. All ranks must call it. Raises UserError.
        """
        causal: Any = self._causal()
        valued = Valued(decoder_of(causal), packs=self._layout == PACKED)
        holds = COMPUTES if self.adapted else torch.float32
        model = self._split(causal, valued, holds=holds, trains=not self.adapted)
        self._share_rows(valued)
        self._adapt(valued.decoder, trains=True)
        valued.add_head(causal.config.get_text_config().hidden_size, self._device)
        return model

    def _causal(self) -> nn.Module:
        """The model without memory for its parameters."""
        with _parameters_on_meta():
            causal = self._empty()
        parameters = dict(causal.named_parameters())
        if other := sorted({str(parameter.dtype) for parameter in parameters.values()} - {str(COMPUTES)}):
            raise UserError(
                f"learner.sharding: {self._path} keeps weights of type {', '.join(other)}, and a sharded model has "
                f'one type; set learner.sharding = "none"'
            )
        self.names = part_names(causal, {name: parameter.detach() for name, parameter in parameters.items()})
        return causal

    def _split(
        self, causal: nn.Module, top: nn.Module, *, holds: torch.dtype, trains: bool, offload: bool = False
    ) -> ShardedModel:
        """Split a model with all or some of the parameters of `causal`, and read the shards."""
        stored = {id(parameter): self.names[name] for name, parameter in causal.named_parameters()}
        names = {name: stored[id(parameter)] for name, parameter in top.named_parameters()}
        for parameter in top.parameters():
            parameter.data = parameter.data.to(holds)
            parameter.requires_grad_(trains)
        model = shard(top.eval(), blocks_of(causal), self._mesh, computes=COMPUTES, offload=offload)
        model.computes_on, model.errors, model.guard.context = self._device, self.errors, self._context
        _give_memory(model, self._device, torch.device("cpu") if offload else self._device)
        self._read(model, names)
        return model

    def _empty(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        attention = packed_attention(self._attention) if self._layout == PACKED else self._attention
        try:
            config = AutoConfig.from_pretrained(self._path)
            causal: nn.Module = AutoModelForCausalLM.from_config(config, dtype=COMPUTES, attn_implementation=attention)
        except Exception as error:
            raise UserError(
                f"model.path: {self._path} is not a causal language model that can be loaded ({sentence(error)}): "
                f"{WHOLE}"
            ) from None
        refuse_attention(self._path, self._attention, config.to_dict())
        refuse_layout(self._path, self._layout, self._attention, config.to_dict())
        return causal

    @torch.no_grad()
    def _read(self, model: ShardedModel, names: dict[str, PartNames]) -> None:
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for own, parameter in model.shards():
                for part in local_parts(names[own], parameter):
                    file = self._files.get(part.name)
                    if file is None:
                        raise UserError(f"model.path: {self._path} has no tensor {part.name}: {WHOLE}")
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                    stored = opened[file].get_slice(part.name)
                    if tuple(stored.get_shape()) != part.shape:
                        raise UserError(
                            f"model.path: {part.name} in {file} has shape {tuple(stored.get_shape())}, but its "
                            f"configuration gives {part.shape}: {WHOLE}"
                        )
                    rows: Tensor = stored[part.start : part.start + len(part.values)] if part.shape else stored[:]
                    part.values.copy_(rows.to(COMPUTES))


@contextmanager
def _plain_weights(module: nn.Module) -> Iterator[None]:
    """Let the linear layers have weights that are no distributed tensors, and empty: peft takes the shape of a shard
    for that of a layer."""
    layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
    weights = [layer._parameters["weight"] for layer in layers]
    for layer in layers:
        empty = torch.empty(0, dtype=layer.weight.dtype, device=layer.weight.device)
        layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer._parameters["weight"] = weight


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are built inside have parameters without memory."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied parameter stays the same object
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _give_memory(model: ShardedModel, device: torch.device, home: torch.device) -> None:
    """Allocate the shards at `home`. Buffers keep their values and go to `device`, tied parameters stay one."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=home)
    for (first, own), *others in tied.values():
        for module, name in others:
            module._parameters[name] = first._parameters[own]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    with torch.no_grad():
        for buffer, values in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(values)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def _tensor_files(path: str) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint. Raises UserError unless its files are safetensors."""
    from transformers.utils.hub import cached_file

    def found(name: str) -> Path | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)

    if (index := found(INDEX)) is not None:
        weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: found(file) for file in sorted(set(weights.values()))}
        if missing := [file for file, place in files.items() if place is None]:
            raise UserError(f"model.path: {path} lacks {missing[0]}: {WHOLE}")
        return {name: place for name, file in weights.items() if (place := files[file]) is not None}
    single = found(SINGLE)
    if single is None:
        raise UserError(
            f"learner.sharding: {path} has no {SINGLE} and no {INDEX}: each rank reads its shards from safetensors. "
            f'Convert the model, or set learner.sharding = "none"'
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
