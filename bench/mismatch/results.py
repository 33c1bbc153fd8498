"""The runs of a measurement, and its result as numbers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import fsum
from typing import Any

from bench.mismatch.measures import NOTHING, Interval, TokenStatistics, bootstrap
from bench.mismatch.references import EXACT, REFERENCES, SURROGATES
from bench.mismatch.toy import Toy
from bench.mismatch.training import LAST, WEIGHT_BOUND, Finished, Observed, Run
from palimpsest.services.learner.observability.surrogate_error import Thresholds

CONTROL = "exact_staleness_0"
"""Exact old log-probs with staleness 0: the newest version samples all tokens."""
METHODS = (*REFERENCES, CONTROL)
Setting = tuple[float, float]
"""c (infinite: no mask) and epsilon."""
MAIN: Setting = (1.2, 0.2)
SCALARS = (
    "mask_slope",
    "mask_slope_at_place",
    "clip_slope",
    "clip_first_minibatch",
    "leak",
    "leak_rms",
    "discrepancy_correlation",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Seeds and settings of the runs."""

    toy: Toy
    seeds: tuple[int, ...]
    bands: tuple[float, ...]
    """Values of c at the main epsilon. The first is the main c."""
    clips: tuple[float, ...]
    """Values of epsilon at the main c. The first is the main epsilon."""

    @property
    def settings(self) -> list[Setting]:
        """Settings in a cross: each threshold varies while the other has its main value."""
        return [(band, MAIN[1]) for band in self.bands] + [(MAIN[0], clip) for clip in self.clips if clip != MAIN[1]]

    def run(self, method: str, setting: Setting, seed: int) -> Run:
        """Return the run. Settings without effect give equal runs: with bypass, no band masks a token."""
        toy, reference = self.toy, method
        if method == CONTROL:
            given = {field.name: getattr(toy, field.name) for field in fields(toy)}
            toy, reference = Toy(**{**given, "window": 0}), EXACT
        band = None if setting[0] == float("inf") or reference == "bypass" else setting[0]
        return Run(toy, reference, Thresholds(band=band, clip_low=setting[1], clip_high=setting[1]), seed)

    def runs(self) -> list[Run]:
        """Return all runs without repetitions."""
        return list(
            dict.fromkeys(
                self.run(method, setting, seed)
                for seed in self.seeds
                for setting in self.settings
                for method in METHODS
            )
        )


def result(plan: Plan, observed: Sequence[Observed], finished: Mapping[Run, Finished]) -> dict[str, Any]:
    """Return the result as JSON. observed: the passive run of each seed, in order."""
    return {
        "name": "mismatch",
        "settings": {
            "toy": asdict(plan.toy),
            "c": [_name(band) for band in plan.bands],
            "epsilon": list(plan.clips),
            "passive": {"c": MAIN[0], "epsilon": MAIN[1]},
            "weight_bound": WEIGHT_BOUND,
            "final_reward_over_versions": LAST,
            "references": {name: config.model_dump() for name, config in SURROGATES.items()},
        },
        "seeds": list(plan.seeds),
        "methods": {method: _method(method, plan, observed, finished) for method in METHODS},
        "leak_by_decay": [
            {"decay": decay, **asdict(bootstrap([each.leaks[decay] for each in observed]))}
            for decay in observed[0].leaks
        ],
    }


def _method(method: str, plan: Plan, observed: Sequence[Observed], finished: Mapping[Run, Finished]) -> dict[str, Any]:
    def runs(setting: Setting, of: str = method) -> list[Finished]:
        return [finished[plan.run(of, setting, seed)] for seed in plan.seeds]

    def rewards(setting: Setting) -> dict[str, Any]:
        own = [run.final_reward for run in runs(setting)]
        exact = [run.final_reward for run in runs(setting, EXACT)]
        return {
            **asdict(bootstrap(own)),
            "by_seed": own,
            "less_exact": asdict(bootstrap([a - b for a, b in zip(own, exact, strict=True)])),
            **_means(runs(setting), ("masked", "clipped", "resets")),
        }

    by_setting = {setting: rewards(setting) for setting in plan.settings}
    return {
        **_passive([each.references[method] for each in observed] if method != CONTROL else []),
        "final_reward": {
            **by_setting[MAIN],
            "by_c": {_name(band): by_setting[band, MAIN[1]] for band in plan.bands},
            "by_epsilon": {_name(clip): by_setting[MAIN[0], clip] for clip in plan.clips},
            "tuned": tuned({setting: each["by_seed"] for setting, each in by_setting.items()}),
        },
        "reward_over_run": asdict(bootstrap([statistics.fmean(run.rewards) for run in runs(MAIN)])),
        "reward_by_version": [
            statistics.fmean(each) for each in zip(*(run.rewards for run in runs(MAIN)), strict=True)
        ],
        **_means(runs(MAIN), ("seconds", "proximal_seconds")),
    }


def _passive(seen: Sequence[TokenStatistics]) -> dict[str, Any]:
    """Return the statistics over the seeds. They are null without a passive run."""
    shares = {}
    for name in ("mask_by_staleness", "clip_by_staleness"):
        columns = zip(*(getattr(each, name) for each in seen), strict=True)
        shares[name] = [asdict(bootstrap(column)) for column in columns] if seen else None
    scalars = {name: bootstrap([getattr(each, name) for each in seen]) if seen else NOTHING for name in SCALARS}
    return {name: asdict(interval) for name, interval in scalars.items()} | shares


def tuned(by_setting: Mapping[Setting, Sequence[float]]) -> dict[str, Any]:
    """Return the final reward at the best setting. The other seeds choose the setting of each seed, so that the choice
    does not bias the reward.

    by_setting: final reward of each seed. `c` and `epsilon`: the best setting by all seeds. The interval is None with a
    single seed.

    >>> tuned({(1.2, 0.2): [1.0, 3.0], (1.5, 0.2): [2.0, 1.0]})["mean"]
    1.0
    """
    seeds = range(len(next(iter(by_setting.values()))))

    def best(of: Iterable[int]) -> Setting:
        chosen = list(of)
        return max(by_setting, key=lambda setting: fsum(by_setting[setting][seed] for seed in chosen))

    band, clip = best(seeds)
    own = [by_setting[best(other for other in seeds if other != seed)][seed] for seed in seeds]
    interval: Interval = bootstrap(own) if len(own) > 1 else NOTHING
    return {"c": _name(band), "epsilon": clip, **asdict(interval)}


def _means(runs: Sequence[Finished], names: Iterable[str]) -> dict[str, float]:
    return {name: statistics.fmean(getattr(run, name) for run in runs) for name in names}


def _name(threshold: float) -> str:
    return f"{threshold:g}"
