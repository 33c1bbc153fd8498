"""Gives the routers of a plain transformers model the experts that the learner replayed. Without code of the services.

The layers of a pass choose one after another, so the calls of `topk` over all experts come in their order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def given_experts(model: Any, routes: np.ndarray | None, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Replay routes in one pass inside this block. None: the routers choose.

    routes: [rows, length, layers, experts of a token], -1 where the router chooses, of layers with experts or of all.
    lengths: of the rows of a packed pass, which leaves the padding out.
    """
    if routes is None:
        yield
        return
    of_token = routes.shape[-1]
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next(getattr(config, name) for name in names if getattr(config, name, None))
    names_of_experts = [name for name, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    if len(names_of_experts) != routes.shape[2]:
        routes = routes[:, :, [int(name.split("layers.")[1].split(".")[0]) for name in names_of_experts]]
    counted = [routes.shape[1]] * len(routes) if lengths is None else lengths
    positions = np.concatenate([row[:length] for row, length in zip(routes, counted, strict=True)])
    layer, own = count(), torch.topk

    def topk(scores: torch.Tensor, k: int, *rest: Any, **named: Any) -> Any:
        result = own(scores, k, *rest, **named)
        if k != of_token or scores.dim() != 2 or scores.shape[1] != experts:
            return result
        given = torch.from_numpy(positions[:, next(layer)]).long().to(scores.device)
        chosen = torch.where(given < 0, result.indices, given)
        return torch.return_types.topk((scores.gather(1, chosen), chosen))

    with patch.object(torch, "topk", topk), patch.object(torch.Tensor, "topk", topk):
        yield
    if next(layer) != routes.shape[2]:
        raise RuntimeError(f"the routers of {type(model).__name__} do not choose once for each layer")
