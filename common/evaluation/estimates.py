"""avg@k and pass@k over tasks, with intervals. Pure.

Of each task, n trajectories were scored and c of them succeeded.

    avg@k    mean over tasks of c / n
    pass@k   mean over tasks of 1 - C(n - c, k) / C(n, k), the unbiased estimate that at least one of k samples succeeds
             (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1)

Tasks differ more than samples of one task, so the interval resamples tasks: the 2.5th to 97.5th percentile of 2,000
bootstrap means. If all tasks have the same value, the bootstrap has no width; then the interval is Wilson's for as many
independent trials as there are tasks. The random generator has a fixed seed, so equal scores give equal intervals.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

RESAMPLES = 2000
INTERVAL = 0.025, 0.975
Z = 1.959963984540054
"""97.5th percentile of the normal distribution."""


class Estimate(Struct, frozen=True, forbid_unknown_fields=True):
    """A mean over tasks and its interval."""

    value: float
    low: float
    high: float


class TaskCounts(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The scored trajectories of one task."""

    samples: int
    successes: int
    reward: float = 0.0
    """Sum of the rewards."""


class EnvironmentResult(Struct, frozen=True, forbid_unknown_fields=True):
    """The result of one environment."""

    tasks: int
    """Tasks with at least one scored trajectory."""
    samples: int
    """Scored trajectories."""
    k: int
    avg: Estimate | None
    """avg@k; None if nothing was scored."""
    passed: Estimate | None
    """pass@k, over the tasks of which at least k trajectories were scored; None without any."""
    reward: float | None
    """Mean over tasks of the mean reward."""
    short: int = 0
    """Tasks of which fewer than k trajectories were scored. pass@k leaves them out."""


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Return the unbiased estimate that at least one of k samples succeeds. Raises ValueError unless k <= samples.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0, 1.0)
    """
    if not 0 <= successes <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {successes} successes: k must be 1 to {samples}")
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of the values of tasks, each in [0, 1], with its interval; None without values.

    >>> estimate([0.5, 0.5])
    Estimate(value=0.5, low=0.09453120573423074, high=0.9054687942657693)
    """
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(set(values)) == 1:
        return Estimate(mean, *_wilson(mean, len(values)))
    array, rng = np.array(values), np.random.default_rng(0)
    means = [array[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, INTERVAL)
    return Estimate(mean, float(low), float(high))


def environment_result(tasks: Sequence[TaskCounts], *, k: int) -> EnvironmentResult:
    """Return the estimates of one environment. k: samples that each task should have."""
    scored = [task for task in tasks if task.samples]
    full = [task for task in scored if task.samples >= k]
    return EnvironmentResult(
        tasks=len(scored),
        samples=sum(task.samples for task in scored),
        k=k,
        avg=estimate([task.successes / task.samples for task in scored]),
        passed=estimate([pass_at_k(task.samples, task.successes, k) for task in full]),
        reward=math.fsum(task.reward / task.samples for task in scored) / len(scored) if scored else None,
        short=len(tasks) - len(full),
    )


def overall(results: Mapping[str, EnvironmentResult]) -> float | None:
    """Return the mean of avg@k over environments, by which versions are compared; None if one has no result."""
    averages = [result.avg.value for result in results.values() if result.avg is not None]
    return math.fsum(averages) / len(averages) if averages and len(averages) == len(results) else None


def parse_results(values: Mapping[str, Any]) -> dict[str, EnvironmentResult]:
    """Return the results in a line of evaluations.jsonl. Raises msgspec.ValidationError."""
    return msgspec.convert(values, dict[str, EnvironmentResult])


def text(found: Estimate | None) -> str:
    """Return an estimate for people.

    >>> text(Estimate(0.5, 0.25, 0.75)), text(None)
    ('0.500 [0.250, 0.750]', 'unknown')
    """
    return "unknown" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _wilson(mean: float, trials: int) -> tuple[float, float]:
    scale = 1 + Z**2 / trials
    middle = (mean + Z**2 / (2 * trials)) / scale
    half = Z * math.sqrt(mean * (1 - mean) / trials + Z**2 / (4 * trials**2)) / scale
    return max(0.0, middle - half) if mean > 0 else 0.0, min(1.0, middle + half) if mean < 1 else 1.0
