"""The policy in training: a bf16 model that computes, float32 masters that learn.

What computes is what is published: after each optimizer step the masters are cast to bf16 into the model, and exactly
those bytes go to the engines. So the policy that sampled a token, and the old policy that scores it, are one.
"""

from typing import Any

import torch
from torch import Tensor

from palimpsest.common.config.learner import OptimizerConfig


class TrainablePolicy:
    """The model and its optimizer.

    Gradients leave the bf16 model as soon as they are there and add up in float32.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig) -> None:
        self.model, self._config = model, config
        self._computing = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self._computing]
        for computing, master in zip(self._computing, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            computing.register_post_accumulate_grad_hook(_collector(master))  # type: ignore[no-untyped-call]
        decayed = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]  # norms and biases are not decayed
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            foreach=True,
        )
        self.steps = 0
        """Optimizer steps taken, skipped ones left out."""

    def gradients(self) -> list[Tensor]:
        """Accumulated float32 gradients, to be summed over ranks."""
        return [m.grad for m in self.masters if m.grad is not None]

    def step(self, *, lr_factor: float = 1.0) -> float:
        """Clip, step, publish into the computing model, forget the gradients; the norm before clipping.

        When the norm is not finite nothing is changed and the step is not counted. lr_factor: of this step alone.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self._config.max_grad_norm))
        if norm == norm and norm != float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * lr_factor
            self.optimizer.step()
            self.steps += 1
            self._publish()
        for gradient in self.gradients():
            gradient.zero_()
        return norm

    @property
    def learning_rate(self) -> float:
        """Of the next step: rises on a straight line over the warm-up, then falls on one until `decay`."""
        config, step = self._config, self.steps + 1
        if step <= config.warmup:
            return config.lr * step / config.warmup
        if not config.decay:
            return config.lr
        fallen = min(1.0, (step - config.warmup) / (config.decay - config.warmup))
        return config.lr * (1.0 - (1.0 - config.end_share) * fallen)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        tensors = {}
        for i, master in enumerate(self.masters):
            moments: dict[str, Any] = self.optimizer.state.get(master, {})
            tensors[f"{i}.master"] = master
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{key}"] = moments.get(key, torch.zeros_like(master))
        return tensors

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Go on from a checkpoint. Raises ValueError when it is another model's."""
        if len(tensors) != 3 * len(self.masters):
            raise ValueError(f"{len(tensors) // 3} parameters stand in it, the model has {len(self.masters)}")
        with torch.no_grad():
            for i, master in enumerate(self.masters):
                if tensors[f"{i}.master"].shape != master.shape:
                    raise ValueError(
                        f"parameter {i} has shape {tuple(tensors[f'{i}.master'].shape)}, here {tuple(master.shape)}"
                    )
                master.copy_(tensors[f"{i}.master"])
                if steps:
                    self.optimizer.state[master] = {
                        "step": torch.tensor(float(steps)),
                        "exp_avg": tensors[f"{i}.exp_avg"].to(master.device).clone(),
                        "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(master.device).clone(),
                    }
        self.steps = steps
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for computing, master in zip(self._computing, self.masters, strict=True):
            computing.copy_(master)


def _collector(master: Tensor) -> Any:
    def collect(computing: Tensor) -> None:
        assert computing.grad is not None
        assert master.grad is not None
        master.grad += computing.grad.float()
        computing.grad = None

    return collect
