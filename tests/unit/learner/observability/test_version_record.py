"""The history line of a version, made from a real training step."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.alert_rules import judge
from palimpsest.services.learner.observability.alerts import VersionReporter
from palimpsest.services.learner.observability.prometheus_export import export_to_prometheus
from palimpsest.services.learner.observability.surrogate_error import Thresholds, audited_tokens, surrogate_error
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.token_table import TokenTable
from palimpsest.services.learner.observability.version_record import Batch, of_versions, version_record
from palimpsest.services.learner.proximal.types import Exact, Patched, Proximal, Surrogate
from palimpsest.services.learner.training.results import StepResult
from tests.learner_parts.models import load, train
from tests.oracles import batch as oracle
from tests.records.builders import a_finished, a_learner, a_row, a_segment

NOW = Version(4)
MOST_BYTES = 12_000
SEPARATE = {"discrepancy_k1", "discrepancy_k2", "staleness_k1", "staleness_k3", "difference_max", "correlation", "same"}


class NoisyProximal:
    """A proximal near the behavior log-probs; its noise makes tokens masked, clipped, and kept."""

    def __init__(self, kind: str = "exact", *, missing: bool = False) -> None:
        self.kind, self.missing = kind, missing

    def proximal(self, batches: list[PaddedBatch], now: Version, fresh: int = 0) -> Proximal:
        generator = torch.Generator().manual_seed(int(now))
        values, absent = [], []
        for batch in batches:
            behavior, mask = torch.from_numpy(batch.behavior), torch.from_numpy(batch.mask)
            values.append(behavior + 0.4 * torch.randn(behavior.shape, generator=generator))
            absent.append(mask & (torch.rand(behavior.shape, generator=generator) < 0.2))
        match self.kind:
            case "exact":
                return Exact(values, absent if self.missing else None)
            case "patched":
                return Patched(values, absent, "bypass")
        return Surrogate(values, self.kind)


def rows(count: int = 16) -> list[Row]:
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = 10 + i % 7
        versions = [-1, -1, *sorted(generator.integers(1, 5, length - 2).tolist())]
        behavior = [-float(x) for x in generator.exponential(1.0, length)]
        tokens = generator.integers(3, 250, length).tolist()
        made.append(a_row(f"r{i:02d}", tokens, versions, advantage=(-1.0) ** i * (1 + i / 5), behavior=behavior))
    return made


def trained(model: Path, source: Any, *, minibatches: int = 1, auditor: Any = None, **sections: Any) -> StepResult:
    policy = TrainablePolicy(load(model), OptimizerConfig(lr=1e-3))
    config = a_learner(**sections)
    parts = [rows()[i::minibatches] for i in range(minibatches)]
    return train(policy, source, ProcessGroup(), parts, NOW, config=config, auditor=auditor)


def a_batch() -> Batch:
    records = [a_finished(i // 4, i % 4, segments=(a_segment(2, 4, 1 + i % 3), a_segment(4, 6, 4))) for i in range(16)]
    return Batch(NOW, Version(NOW + 1), records, [rows()[i : i + 4] for i in range(0, 16, 4)])


def line_of(done: StepResult, config: LearnerConfig | None = None, **more: Any) -> dict[str, Any]:
    return version_record(
        a_batch(), done, seconds=12.3456, phases={"wait": 1.0, "train": 2.0}, learning_rate=1e-3,
        counts={"offered": 32, "trained": 16, "dropped": {}, "dead_lettered": 0, "pending": 16}, sampled_tokens=500,
        bounds=RunThresholds.of(config) if config else None, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(starting_model: Path) -> StepResult:
    return trained(starting_model, NoisyProximal(), minibatches=2)


def test_a_line_is_short_and_complete(exact: StepResult) -> None:
    line = line_of(exact, a_learner())
    encoded = msgspec.json.encode(line)
    assert sorted(line["by_staleness"]) == ["0", "1", "2", "3"]
    assert len(encoded) < MOST_BYTES, len(encoded)
    assert msgspec.json.decode(encoded) == line
    for values in (line["all"], *line["by_staleness"].values()):
        assert values.keys() >= SEPARATE
    assert (line["kind"], line["objective"], line["proximal"], line["exact"]) == ("snapshot", "clipped", "exact", True)
    assert line["alerts"] == []
    assert judge([line]) == []


def test_the_longest_line_is_short_enough(starting_model: Path) -> None:
    """An audited batch with every rule on, two minibatches, and long gauges."""
    sections = {
        "proximal": {"kind": "ppo_ewma_async"},
        "audit": {"fraction": 1.0},
        "discrepancy": {
            "band": 1.3, "tokens": [0.8, 1.6], "geometric": [0.9, 1.15], "sequence": [0.5, 3.0], "segment": [0.85, 1.3],
            "veto": 0.55, "difference": 0.25, "weight": "clipped",
            "estimates": {"k1_token": 0.2, "k2_token": 0.05, "k3_token": 0.05, "k2_sequence_max": 0.3},
        },
        "loss": {"dual_clip": 1.5, "opsm": 0.01},
    }  # fmt: skip
    done = trained(starting_model, NoisyProximal("ppo_ewma_async"), minibatches=2, auditor=NoisyProximal(), **sections)
    gauges = dict.fromkeys(("multiplier", "entropy_history", "ewma_decay", "ewma_age", "ewma_weight"), 0.123456789)
    line = line_of(dataclasses.replace(done, gauges=gauges), a_learner(**sections))
    assert len(msgspec.json.encode(line)) < MOST_BYTES
    assert line["leak"]["by_staleness"].keys() == line["by_staleness"].keys()


def test_fields_that_other_programs_read_are_present(exact: StepResult) -> None:
    line = line_of(exact)
    for name in (
        "version", "published", "seconds", "phases", "trajectories", "sampled_tokens", "batch", "groups", "tokens",
        "length", "reward", "successes", "even_groups", "multi_version", "cuts", "exact", "proximal", "active_share",
        "lr_factor", "normalizer", "baseline", "train_seconds", "gauges", "loss", "grad_norm", "skipped",
        "learning_rate", "ess", "all", "by_staleness", "first_minibatch", "staleness_max", "staleness_mean",
    ):  # fmt: skip
        assert name in line, name
    for values in (*line["by_staleness"].values(), *line["first_minibatch"].values()):
        assert {"tokens", "log_discrepancy_abs", "log_staleness_ratio_abs", "log_total_ratio_abs", "masked"} <= set(
            values
        )
    assert (line["kind"], line["objective"], line["caps"]) == ("exact", None, None)


def test_distributions_equal_those_of_the_tokens(exact: StepResult) -> None:
    line, flat = line_of(exact, a_learner()), TokenTable.of(exact.micro_batches, NOW)
    t = flat.tokens
    ratios = {
        "discrepancy": (t.proximal - t.behavior, np.ones(len(flat.first), dtype=bool)),
        "staleness_first": (t.current - t.proximal, flat.first),
        "staleness_later": (t.current - t.proximal, ~flat.first),
        "total": (t.current - t.behavior, np.ones(len(flat.first), dtype=bool)),
    }
    assert line["ratios"].keys() == ratios.keys()
    for name, (values, of) in ratios.items():
        reported = line["ratios"][name]
        assert reported["all"]["bins"] == oracle.bins(values[of].tolist())
        for age in ("0", "1", "2", "3"):
            chosen = values[of & (t.staleness == int(age))].tolist()
            assert reported[age]["bins"] == oracle.bins(chosen)
            expected = [oracle.quantile(chosen, share) for share in (0.01, 0.05, 0.5, 0.95, 0.99, 1.0)]
            assert reported[age]["quantiles"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_with_one_minibatch_there_is_no_later_staleness_ratio(starting_model: Path) -> None:
    assert "staleness_later" not in line_of(trained(starting_model, NoisyProximal()))["ratios"]


def test_slopes_equal_those_over_single_tokens(exact: StepResult) -> None:
    line, tokens = line_of(exact, a_learner()), TokenTable.of(exact.micro_batches, NOW).tokens
    for name in ("masked", "clipped"):
        expected = oracle.line(tokens.staleness.tolist(), getattr(tokens, name).astype(float).tolist())
        assert line["slopes"][name] == pytest.approx(expected, rel=1e-4)


def test_18_11_the_removals_of_a_line_add_up(exact: StepResult) -> None:
    line = line_of(exact, a_learner())
    removal = line["removal"]
    assert removal["removed"] > 0
    assert sum(pair[1] for pair in removal["causes"].values()) + removal["overlap"] == removal["removed"]
    assert removal["active"] / removal["tokens"] == pytest.approx(line["active_share"])
    assert removal["masked"] / removal["tokens"] == pytest.approx(line["all"]["masked"], rel=1e-4)


def test_18_15_fallbacks_are_zero_in_a_normal_run_and_positive_under_each_fault(
    starting_model: Path, exact: StepResult
) -> None:
    config = a_learner()
    assert line_of(exact, config)["fallbacks"] == {"missing": 0, "surrogate": 0, "nonfinite": 0}
    assert line_of(exact, config)["old"] == {"coverage": 1.0, "known": 1.0}

    missing = line_of(trained(starting_model, NoisyProximal(missing=True)), config)
    assert missing["fallbacks"]["missing"] == missing["all"]["missing"] > 0
    assert missing["old"]["coverage"] == pytest.approx(1 - missing["all"]["missing"] / missing["tokens"], rel=1e-4)

    patched = line_of(trained(starting_model, NoisyProximal("patched")), config)
    assert patched["fallbacks"]["surrogate"] > 0
    assert (patched["kind"], patched["proximal"], patched["exact"]) == ("snapshot", "bypass", False)

    broken = trained(starting_model, NoisyProximal())
    broken.micro_batches[0].current[0, 5] = float("nan")
    assert line_of(broken, config)["fallbacks"]["nonfinite"] == 1

    other = line_of(exact, config, fallbacks={"conflict": 3})
    assert other["fallbacks"]["conflict"] == 3
    for line in (missing, patched, line_of(broken, config), other):
        assert [alert.rule for alert in judge([line])] == ["fallback"]


def test_a_configured_surrogate_is_no_fallback(starting_model: Path) -> None:
    config = a_learner(proximal={"kind": "ewma_prox"})
    line = line_of(trained(starting_model, NoisyProximal("ewma_prox")), config)
    assert set(line["fallbacks"].values()) == {0}
    assert (line["old"], line["leak"]) == ({"coverage": 0.0, "known": 0.0}, None)


def test_an_audited_batch_reports_its_surrogate_error(starting_model: Path) -> None:
    config = a_learner(proximal={"kind": "ewma_prox"}, audit={"fraction": 1.0})
    done = trained(
        starting_model, NoisyProximal("ewma_prox"), auditor=NoisyProximal(missing=True), proximal={"kind": "ewma_prox"},
        audit={"fraction": 1.0},
    )  # fmt: skip
    line, flat = line_of(done, config), TokenTable.of(done.micro_batches, NOW)
    e = (flat.tokens.proximal - flat.tokens.old)[~np.isnan(flat.tokens.old)]
    assert 0 < len(e) < line["tokens"]
    assert line["leak"]["tokens"] == len(e) == pytest.approx(line["old"]["known"] * line["tokens"], rel=1e-4)
    assert line["leak"]["leak_rms"] == pytest.approx(math.sqrt(np.mean(e.astype(np.float64) ** 2)), rel=1e-4)
    assert line["leak"]["leak_mean"] == pytest.approx(e.mean(), rel=1e-3, abs=1e-5)
    thresholds = Thresholds(band=2.0, clip_low=0.2, clip_high=0.2)
    expected = surrogate_error(audited_tokens(flat), thresholds)
    assert line["leak"]["removed_wrongly"] == pytest.approx(expected["removed_wrongly"], rel=1e-4)
    assert line["fallbacks"]["missing"] == 0
    without_clip = line_of(
        done, config.model_copy(update={"loss": config.loss.model_copy(update={"objective": "r2vpo"})})
    )
    assert without_clip["leak"]["clipped_wrongly"] is without_clip["leak"]["unclipped_wrongly"] is None
    assert without_clip["leak"]["masked_wrongly"] == line["leak"]["masked_wrongly"]


def test_versions_of_a_batch_counted_by_hand() -> None:
    """Sixteen trajectories of versions {1, 4}, {2, 4}, {3, 4} in turn, four per group."""
    batch = a_batch()
    found = of_versions(batch)
    assert found == {
        "per_trajectory_mean": 2.0,
        "per_trajectory_max": 2,
        "group_span_mean": 3.0,
        "group_span_max": 3,
        "oldest": {"1": 5, "2": 5, "3": 6},
        "length": {"1": 8.0, "2": 8.0, "3": 8.0},
    }
    assert sum(found["oldest"].values()) == 16


def test_tokens_that_are_too_old_are_counted_and_belong_to_no_version_of_the_batch(exact: StepResult) -> None:
    """Of the 16 trajectories, 6 have two tokens of version 1 and 5 have two of version 2; versions from 2 on are in."""
    batch = dataclasses.replace(a_batch(), lowest=2)
    assert batch.over_staleness() == 6 * 2
    found = of_versions(batch)
    assert found["oldest"] == {"0": 6, "1": 5, "2": 5}
    assert (found["per_trajectory_mean"], found["group_span_max"]) == (pytest.approx(1.625), 2)
    assert line_of(exact)["masked_tokens"] == {"over_staleness": 0}
    stale = [a_finished(3, 4, reward=1.0)]
    assert dataclasses.replace(batch, stale=stale).rewards()[3] == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_groups_of_equal_rewards_are_counted_by_environment(exact: StepResult) -> None:
    line = line_of(exact, skipped_even={"tables": 3})
    assert line["even_by_environment"] == {
        "lookup": {"kept": 4, "skipped": 0},
        "tables": {"kept": 0, "skipped": 3},
    }


def test_an_environment_has_its_trajectories_groups_and_mean_reward(exact: StepResult) -> None:
    line = line_of(exact)
    assert line["by_environment"] == {"lookup": {"trajectories": 16, "groups": 4, "reward": 0.5}}
    assert line["truncated"] == 0


def test_costs_are_shares_of_the_training_time(exact: StepResult) -> None:
    done = dataclasses.replace(exact, seconds={"proximal": 0.5, "passes": 1.0, "step": 0.1})
    cost = line_of(done)["cost"]
    assert cost == {"proximal": 0.25, "passes": 0.5, "step": 0.05, "rest": pytest.approx(0.2)}


def test_a_line_is_exported_to_prometheus(exact: StepResult) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"palimpsest_learner_{name}", labels) or 0.0

    line = line_of(dataclasses.replace(exact, gauges={"multiplier": 2.0}), a_learner())
    before = value("removed_tokens_total", cause="band_high", exclusive="no")
    binned = value("log_ratio_tokens_total", ratio="total", staleness="3-4", above="-0.01")
    export_to_prometheus(line)
    assert (
        value("removed_tokens_total", cause="band_high", exclusive="no") - before
        == (line["removal"]["causes"]["band_high"][0])
    )
    assert (
        value("log_ratio_tokens_total", ratio="total", staleness="3-4", above="-0.01") - binned
        == (line["ratios"]["total"]["3"]["bins"][8])
    )
    assert value("effective_share", of="sequences", weights="raw") == line["ess_shares"]["sequences_raw"]
    assert value("removal_slope", removal="clipped") == line["slopes"]["clipped"]
    assert value("old_coverage") == 1.0
    assert value("companion", what="multiplier") == 2.0
    assert value("environment_reward", environment="lookup") == line["by_environment"]["lookup"]["reward"]
    assert value("entropy") == line["all"]["entropy"] > 0
    assert value("learning_rate") == line["learning_rate"] > 0
    export_to_prometheus(line | {"truncated": 4})
    assert value("truncated_share") == 4 / line["batch"]


def test_a_staleness_absent_from_the_last_batch_is_exported_as_nan(exact: StepResult) -> None:
    def masked(staleness: str) -> float | None:
        return REGISTRY.get_sample_value("palimpsest_learner_masked_share", {"staleness": staleness})

    line = line_of(exact, a_learner())
    export_to_prometheus(line)
    assert masked("3") == line["by_staleness"]["3"]["masked"]
    export_to_prometheus(
        line | {"by_staleness": {age: values for age, values in line["by_staleness"].items() if age != "3"}}
    )
    assert math.isnan(masked("3") or 0.0)
    assert masked("0") == line["by_staleness"]["0"]["masked"]
    export_to_prometheus(line)
    assert masked("3") == line["by_staleness"]["3"]["masked"]


def test_a_reporter_continues_from_the_history(exact: StepResult, tmp_path: Path) -> None:
    """Two versions, a restart, and four more: each line is judged with those before it."""
    history, config = tmp_path / "history.jsonl", a_learner()
    facts: dict[str, Any] = {"seconds": 1.0, "phases": {}, "learning_rate": 1e-3, "counts": {}, "sampled_tokens": 1}
    alerts: list[list[str]] = []
    for counters in ([{"conflict": 1}, {}], [{}, {}, {}, {}]):
        reporter = VersionReporter(RunThresholds.of(config), history)
        reporter.start()
        for counter in counters:
            line = reporter.line(a_batch(), exact, fallbacks=counter, **facts)
            alerts.append([alert["rule"] for alert in line["alerts"]])
            with history.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
    # the noise of the proximal removes 54 % of the tokens
    assert alerts == [["fallback"]] * 4 + [["fallback", "mostly_removed"], ["mostly_removed"]]
