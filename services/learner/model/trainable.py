"""The policy in training: a bf16 model for the passes, float32 masters for the optimizer.

After each optimizer step the masters are cast to bf16 into the model. The engines receive exactly these bytes, so the
policy that samples a token and the old policy that scores the token have the same weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.services.learner.distributed import ProcessGroup


class TrainablePolicy:
    """The model and its optimizer.

    A hook moves each bf16 gradient into the float32 gradient of the master as soon as autograd has accumulated it.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, *, offload: bool = False) -> None:
        """offload: masters, gradients and moments are in the host's memory, and the optimizer computes there."""
        self.model, self._config = model, config
        self._computing = [p for p in model.parameters() if p.requires_grad]
        home = torch.device("cpu") if offload else None
        self.masters = [p.detach().to(home or p.device, torch.float32, copy=True) for p in self._computing]
        for computing, master in zip(self._computing, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            computing.register_post_accumulate_grad_hook(_collector(master))  # type: ignore[no-untyped-call]
        self.optimizer = adamw(self.masters, config)
        self.steps = 0
        """Number of optimizer steps taken; skipped steps do not count."""

    def configure(self, config: OptimizerConfig) -> None:
        """Use another learning rate, schedule and maximum norm from the next step on; the moments stay."""
        self._config = config

    def gradients(self) -> list[Tensor]:
        """Return the accumulated float32 gradients, to be summed over ranks."""
        return [m.grad for m in self.masters if m.grad is not None]

    def sum_gradients(self, ranks: ProcessGroup) -> None:
        """Replace the gradients by their sums over the ranks. All ranks must call it."""
        ranks.all_reduce_sum(self.gradients())

    def squared_norm(self) -> float:
        """Return the square of the norm of all gradients that this rank holds, added in float64."""
        return sum(float(gradient.double().square().sum()) for gradient in self.gradients())

    def discard_gradients(self) -> None:
        """Set all gradients to zero. Weights, moments, schedule and step count do not change."""
        for parameter in self._computing:
            parameter.grad = None  # of a pass that failed before its gradient was moved to the master
        for gradient in self.gradients():
            gradient.zero_()

    def step(self, *, lr_factor: float = 1.0) -> float:
        """Clip the gradients, take an optimizer step, update the model, reset the gradients. Return the norm.

        The norm is the one before clipping. If the norm is not finite, the step is skipped and not counted.
        lr_factor: multiplies the learning rate of this step only.
        """
        norm = self._clip()
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
        """Learning rate of the next step: linear rise over the warm-up, then linear fall until step `decay`."""
        config, step = self._config, self.steps + 1
        if step <= config.warmup:
            return config.lr * step / config.warmup
        if not config.decay:
            return config.lr
        fallen = min(1.0, (step - config.warmup) / (config.decay - config.warmup))
        return config.lr * (1.0 - (1.0 - config.end_share) * fallen)

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments by name, for a checkpoint."""
        tensors = {}
        for i, master in enumerate(self.masters):
            moments: dict[str, Any] = self.optimizer.state.get(master, {})
            tensors[f"{i}.master"] = master
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{key}"] = moments.get(key, torch.zeros_like(master))
        return tensors

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restore a checkpoint. Raises ValueError if it belongs to another model."""
        if len(tensors) != 3 * len(self.masters):
            raise ValueError(f"checkpoint has {len(tensors) // 3} parameters; the model has {len(self.masters)}")
        with torch.no_grad():
            for i, master in enumerate(self.masters):
                if tensors[f"{i}.master"].shape != master.shape:
                    raise ValueError(
                        f"parameter {i} has shape {tuple(tensors[f'{i}.master'].shape)} in the checkpoint; "
                        f"the model has {tuple(master.shape)}"
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

    def _clip(self) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.masters, self._config.max_grad_norm))

    def share(self, ranks: ProcessGroup) -> None:
        """Overwrite every rank's masters and moments with those of rank 0. All ranks must call it."""
        steps, tensors = ranks.broadcast_object(self.steps), self.state()
        ranks.broadcast(list(tensors.values()))
        if not ranks.is_rank0:
            self.restore(tensors, steps)

    @torch.no_grad()
    def _publish(self) -> None:
        for computing, master in zip(self._computing, self.masters, strict=True):
            computing.copy_(master)


def adamw(masters: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return the optimizer of float32 masters. Weight decay skips norms and biases."""
    decayed = [m for m in masters if m.ndim >= 2]
    plain = [m for m in masters if m.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        foreach=True,
    )


def _collector(master: Tensor) -> Any:
    def collect(computing: Tensor) -> None:
        assert computing.grad is not None
        assert master.grad is not None
        master.grad += computing.grad.to(master.device).float()  # two bytes a number cross the bus, not four
        computing.grad = None

    return collect
