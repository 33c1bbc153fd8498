"""The moving average compared with its closed form, and its invariants (algorithms.md 4.6, 4.7, 18.3)."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from palimpsest.services.learner.proximal.surrogates.weight_average import Average, staleness_decay, window_decay
from tests.oracles.surrogates import averages, center_of_mass

DRAWS = 200


def scalar(value: float) -> list[Tensor]:
    return [torch.tensor([float(value)])]


def run(values: Sequence[float], decays: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average and weight after each version; a decay of -1 is a reset."""
    average = Average(scalar(values[0]))
    means, weights = [float(average.means[0])], [average.weight]
    for value, decay in zip(values[1:], decays, strict=True):
        if decay < 0:
            average.reset(scalar(value))
        else:
            average.take(scalar(value), decay=decay)
        means.append(float(average.means[0]))
        weights.append(average.weight)
    return means, weights


@pytest.mark.parametrize(
    ("decays", "weights", "means"),
    [
        ([0.5, 0.5, 0.5], [1, 1.5, 1.75, 1.875], [1, 1.66667, 2.42857, 3.26667]),
        ([0.5, -1, 0.5], [1, 1.5, 1, 1.5], [1, 1.66667, 3, 3.66667]),
        ([0.8, 0.8, 0.8], [1, 1.8, 2.44, 2.952], [1, 1.55556, 2.14754, 2.77507]),
    ],
    ids=["beta .5", "beta .5, reset at 3", "beta .8"],
)
def test_18_3_example_b_to_all_digits(decays: list[float], weights: list[float], means: list[float]) -> None:
    got = run([1, 2, 3, 4], decays)
    assert got[0] == pytest.approx(means, abs=5e-6)
    assert got[1] == pytest.approx(weights, abs=1e-12)


def test_18_3_the_average_is_the_unbiased_one() -> None:
    assert run([1, 2, 3, 4], [0.5] * 3)[0] != pytest.approx([1, 1.5, 2.25, 3.125], abs=1e-2)


def test_18_3_recursion_and_closed_form_agree_under_any_decays_and_resets() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        versions = int(generator.integers(2, 25))
        thetas = [generator.normal(0, 1, (3, 2)).astype(np.float32).astype(np.float64) for _ in range(versions)]
        decays = [float(generator.choice([0.0, generator.random() * 0.98])) for _ in range(versions - 1)]
        resets = generator.random(versions - 1) < 0.15
        average = Average([torch.tensor(thetas[0], dtype=torch.float32)])
        got = [(average.means[0].numpy().copy(), average.weight, average.center_of_mass)]
        for theta, decay, reset in zip(thetas[1:], decays, resets, strict=True):
            master = [torch.tensor(theta, dtype=torch.float32)]
            if reset:
                average.reset(master)
            else:
                average.take(master, decay=decay)
            got.append((average.means[0].numpy().copy(), average.weight, average.center_of_mass))
        effective = [0.0 if reset else decay for decay, reset in zip(decays, resets, strict=True)]
        for t, (mean, weight, age) in enumerate(zip(*averages(thetas, effective), strict=True)):
            np.testing.assert_allclose(got[t][0], mean, atol=2e-6, err_msg=f"seed {seed}, version {t}")
            assert got[t][1] == pytest.approx(weight, rel=1e-12)
            assert got[t][2] == pytest.approx(age, rel=1e-9, abs=1e-12)


def test_18_3_the_average_of_constant_weights_equals_them_bit_for_bit() -> None:
    theta = [torch.randn(500, generator=torch.Generator().manual_seed(1)) * 10**k for k in range(-6, 4)]
    average = Average(theta)
    for tick in range(50):
        average.take(theta, decay=0.01 + 0.98 * tick / 50)
        assert all(torch.equal(mean, master) for mean, master in zip(average.means, theta, strict=True))


def test_18_3_after_a_reset_the_mean_age_grows_as_in_the_table() -> None:
    table = {1: 0.0, 2: 0.4, 3: 0.737, 5: 1.242, 10: 1.824, 20: 1.994}
    average = Average(scalar(0.0))
    for _ in range(7):
        average.take(scalar(0.0), decay=0.9)
    average.reset(scalar(0.0))
    for versions in range(1, 21):
        assert average.versions == versions
        assert average.center_of_mass == pytest.approx(center_of_mass(2 / 3, versions), abs=1e-12)
        if versions in table:
            assert average.center_of_mass == pytest.approx(table[versions], abs=5e-4)
        average.take(scalar(0.0), decay=2 / 3)


def test_18_3_the_decay_of_a_window_gives_a_mean_age_of_half_the_window() -> None:
    table = {0: 0.0, 1: 1 / 3, 2: 0.5, 4: 0.6667, 8: 0.8, 16: 0.8889}
    for window, decay in table.items():
        assert window_decay(window) == pytest.approx(decay, abs=5e-5)
        assert window_decay(window) / (1 - window_decay(window)) == pytest.approx(window / 2)
        assert staleness_decay(window / 2) == pytest.approx(window_decay(window))


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"it must be in \[0, 1\)"):
        Average(scalar(1.0)).take(scalar(2.0), decay=wrong)


def test_a_window_or_staleness_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="window is -1"):
        window_decay(-1)
    with pytest.raises(ValueError, match=r"staleness is -0\.5"):
        staleness_decay(-0.5)


def test_18_3_a_restored_average_continues_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)

    def version() -> list[Tensor]:
        return [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]

    average = Average(version())
    for decay in (0.3, 0.7, 0.9):
        average.take(version(), decay=decay)
    kept = load_tensors(save_tensors(average.state()))
    other = Average(version())
    other.restore(kept)
    for decay in (0.9, 0.2, 0.0, 0.5):
        theta = version()
        average.take(theta, decay=decay)
        other.take(theta, decay=decay)
        mine, its = average.state(), other.state()
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
        assert (average.weight, average.center_of_mass) == (other.weight, other.center_of_mass)


def test_the_state_of_another_model_is_refused() -> None:
    average = Average([torch.zeros(2, 3), torch.zeros(4)])
    with pytest.raises(ValueError, match="resuming would reset the average"):
        average.restore({})
    with pytest.raises(ValueError, match="in this model"):
        average.restore(Average([torch.zeros(2, 3), torch.zeros(5)]).state())
    with pytest.raises(ValueError, match="a larger model"):
        average.restore(Average([torch.zeros(2, 3), torch.zeros(4), torch.zeros(1)]).state())
    assert average.weight == 1.0


def test_18_3_in_bf16_an_average_would_freeze() -> None:
    """lr 1e-6 on weights of 1e-2, 100 versions at beta 0.8: steps of 1/10,000, where bf16 resolves 1/256."""
    decay, moved, versions = 0.8, 1e-6, 100
    thetas = [torch.full((3,), 1e-2 + moved * k) for k in range(versions)]
    average = Average(thetas[:1])
    narrow, weight = thetas[0].to(torch.bfloat16), 1.0
    start = narrow.clone()
    for theta in thetas[1:]:
        average.take([theta], decay=decay)
        weight = decay * weight + 1
        narrow = narrow + ((theta.to(torch.bfloat16) - narrow) / weight).to(torch.bfloat16)
        assert torch.equal(narrow, start)
    true = 1e-2 + moved * (versions - 1 - decay / (1 - decay))
    assert average.means[0].tolist() == pytest.approx([true] * 3, abs=1e-8)
    assert abs(float(narrow[0]) - true) > 50 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_than_float32_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="pass the float32 masters"):
        Average([torch.zeros(2), torch.zeros(2, dtype=dtype)])


def test_the_average_is_a_copy_and_leaves_the_masters_alone() -> None:
    masters = [torch.ones(3)]
    average = Average(masters)
    masters[0].fill_(5.0)
    assert average.means[0].tolist() == [1.0] * 3
    average.take(masters, decay=0.5)
    assert masters[0].tolist() == [5.0] * 3
    average.reset(masters)
    masters[0].fill_(7.0)
    assert average.means[0].tolist() == [5.0] * 3


def test_a_reset_removes_nonfinite_values() -> None:
    average = Average(scalar(float("nan")))
    average.take(scalar(2.0), decay=0.0)
    assert average.means[0].tolist() == [2.0]
    average = Average(scalar(float("inf")))
    average.reset(scalar(3.0))
    assert average.means[0].tolist() == [3.0]


def test_the_distance_is_relative_to_the_weights() -> None:
    average = Average([torch.tensor([3.0, 0.0]), torch.tensor([0.0])])
    assert average.distance([torch.tensor([3.0, 0.0]), torch.tensor([4.0])]) == pytest.approx(4 / 5)
    assert Average(scalar(0.0)).distance(scalar(0.0)) == 0.0
