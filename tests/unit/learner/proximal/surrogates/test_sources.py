"""Edge cases of each surrogate: staleness 0, log-probs that are not finite, tokens of a future version."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import PpoEwmaAsyncProximal
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, pad
from palimpsest.services.learner.proximal.surrogates.bypass import Bypass
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.surrogates.forward_pass import Shadow
from palimpsest.services.learner.proximal.surrogates.interp_prox_loglinear import Loglinear, current_share
from palimpsest.services.learner.proximal.surrogates.linear_prox import LinearProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.types import Source
from tests.learner_parts.models import CPU, CurrentModel, load, perturb
from tests.records.builders import a_row

NOW = Version(8)


def batch(versions: list[int], behavior: list[float]) -> PaddedBatch:
    return pad([a_row("a", list(range(3, 3 + len(versions))), versions, behavior=behavior)])


def anchored(source: Source, padded: PaddedBatch, current: list[float]) -> Tensor:
    proximal = source.proximal([padded], NOW)
    return proximal.anchor(0, torch.tensor([current]), torch.from_numpy(padded.mask)).logprobs[0]


def test_bypass_returns_the_behavior_log_probs() -> None:
    padded = batch([-1, 8, 3], [0.0, -0.5, -2.0])
    assert anchored(Bypass(CPU), padded, [9.0, 9.0, 9.0]).tolist() == [0.0, -0.5, -2.0]


def test_bypass_keeps_nonfinite_log_probs() -> None:
    padded = batch([8, 8], [float("-inf"), -2.0])
    assert anchored(Bypass(CPU), padded, [-1.0, -1.0]).tolist() == [float("-inf"), -2.0]


def test_the_weight_of_the_current_log_prob_grows_with_staleness() -> None:
    padded = batch([-1, 8, 7, 6, 4, 0], [0.0] * 6)
    assert current_share(padded, NOW)[0].tolist() == [0.0, 0.0, 0.0, 0.5, 0.75, 0.875]


def test_up_to_staleness_1_loglinear_ignores_the_current_log_prob() -> None:
    nan = float("nan")
    got = anchored(Loglinear(CPU), batch([8, 7, 6], [-0.7, -0.9, -1.1]), [nan, nan, nan])
    assert got[:2].tolist() == pytest.approx([-0.7, -0.9])
    assert got[2].isnan()


@pytest.mark.parametrize("source", [Loglinear(CPU), LinearProx(CPU, behavior_share=0.5)], ids=["log", "arithmetic"])
def test_a_behavior_log_prob_that_is_nan_stays_nan(source: Source) -> None:
    assert anchored(source, batch([4, 4], [float("nan"), -1.0]), [-1.0, -1.0]).isnan().tolist() == [True, False]


def test_loglinear_refuses_a_token_of_a_future_version() -> None:
    with pytest.raises(ValueError, match="version 9, which is after the version 8"):
        Loglinear(CPU).proximal([batch([3, 9], [-1.0, -1.0])], NOW)


def test_each_micro_batch_has_its_own_values() -> None:
    batches = [batch([4, 4], [-1.0, -2.0]), batch([6, 8, 8], [-3.0, -4.0, -5.0])]
    for source in (Loglinear(CPU), LinearProx(CPU, behavior_share=1.0), Bypass(CPU)):
        proximal = source.proximal(batches, NOW)
        for place, padded in enumerate(batches):
            now = torch.from_numpy(padded.behavior.copy())
            anchor = proximal.anchor(place, now, torch.from_numpy(padded.mask))
            assert torch.allclose(anchor.logprobs, now)


def test_linear_at_weights_0_and_1_is_one_of_the_two_inputs() -> None:
    padded, current = batch([4, 4], [-0.7, -3.0]), [-1.3, -0.2]
    assert torch.equal(anchored(LinearProx(CPU, behavior_share=0.0), padded, current), torch.tensor(current))
    expected = torch.from_numpy(padded.behavior[0])
    assert torch.equal(anchored(LinearProx(CPU, behavior_share=1.0), padded, current), expected)


def test_linear_does_not_underflow_where_probabilities_would() -> None:
    got = anchored(LinearProx(CPU, behavior_share=0.5), batch([4, 4], [-200.0, -300.0]), [-400.0, -250.0])
    assert got.tolist() == pytest.approx([-200.0 + np.log(0.5), -250.0 + np.log(0.5)], rel=1e-6)


@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_an_invalid_share_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        LinearProx(CPU, behavior_share=wrong)


def test_an_invalid_beta_is_refused(starting_model: Path) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        EwmaProx(load(starting_model), [], CPU, decay=1.0)


def test_current_recompute_uses_the_models_current_weights(starting_model: Path) -> None:
    model = load(starting_model)
    source = CurrentRecompute(model, CPU)
    padded = batch([-1, 8, 3, 0], [0.0, -1.0, -1.0, -1.0])
    (before,) = source.proximal([padded], NOW).logprobs
    perturb(model, by=0.05, seed=1)
    (after,) = source.proximal([padded], NOW).logprobs
    assert torch.equal(after[0, 1:], CurrentModel(model).proximal([padded], NOW).logprobs[0][0, 1:])
    assert float((after - before)[0, 1:].abs().min()) > 1e-4
    assert not after.requires_grad


def test_a_shadow_keeps_the_models_frozen_parameters(starting_model: Path) -> None:
    model = load(starting_model)
    frozen = next(model.parameters()).requires_grad_(False)
    shadow = Shadow(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copied = shadow.with_weights([parameter.float() + 1 for parameter in learning])
    assert copied is shadow.with_weights([parameter.float() + 1 for parameter in learning])
    assert torch.equal(next(copied.parameters()), frozen)
    own = list(copied.parameters())[1:]
    assert len(own) == len(learning)
    for parameter, mine in zip(learning, own, strict=True):
        assert torch.equal(mine, (parameter.float() + 1).to(torch.bfloat16))
        assert not mine.requires_grad
    with pytest.raises(ValueError, match=f"1 weights do not match {len(learning)}"):
        shadow.with_weights([torch.zeros(2)])


@pytest.mark.parametrize(
    ("keys", "made"),
    [
        ({"kind": "bypass"}, Bypass),
        ({"kind": "current_recompute"}, CurrentRecompute),
        ({"kind": "interp_prox_loglinear"}, Loglinear),
        ({"kind": "linear_prox"}, LinearProx),
        ({"kind": "ewma_prox"}, EwmaProx),
        ({"kind": "ppo_ewma_async"}, PpoEwmaAsync),
    ],
)
def test_the_configuration_selects_the_surrogate(keys: dict[str, object], made: type, starting_model: Path) -> None:
    config = LearnerConfig.model_validate({"versions": 1, "proximal": keys}).proximal
    model = load(starting_model)
    masters = [parameter.detach().float() for parameter in model.parameters()]
    source = build_surrogate(config, model=model, masters=masters, device=CPU, max_staleness=6)
    assert type(source) is made
    if isinstance(source, EwmaProx):
        assert source.decay == 0.8
    if isinstance(source, PpoEwmaAsync):
        assert source.decay == 0.75  # the window is max_staleness


@pytest.mark.parametrize(("window", "decay"), [("max_staleness", 0.75), (4, 2 / 3), ("measured", 0.0)])
def test_the_window_is_the_configured_one(window: int | str, decay: float) -> None:
    config = PpoEwmaAsyncProximal.model_validate({"kind": "ppo_ewma_async", "window": window})
    model = torch.nn.Linear(2, 2)
    source = build_surrogate(config, model=model, masters=[], device=CPU, max_staleness=6)
    assert isinstance(source, PpoEwmaAsync)
    assert source.decay == pytest.approx(decay)


def test_the_reset_rule_is_the_configured_one() -> None:
    keys = {"kind": "ppo_ewma_async", "reset": "guarded", "threshold": 0.95, "patience": 1, "cooldown": 2}
    config = PpoEwmaAsyncProximal.model_validate(keys)
    source = build_surrogate(config, model=torch.nn.Linear(2, 2), masters=[], device=CPU, max_staleness=6)
    assert isinstance(source, PpoEwmaAsync)
    for share in (0.8, 0.7, 0.7, 0.7, 0.7):
        source.published([], active_share=share, mean_staleness=1.0)
    assert sum(source.resets.values()) == 2  # at once, and again after a cooldown of two versions
