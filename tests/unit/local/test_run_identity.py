"""The configuration keys that a resumed run may change, and those it may not."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.user_error import UserError
from palimpsest.services.local.run_identity import CHANGEABLE, IDENTITY, differences
from palimpsest.services.local.run_setup import resolve

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'
KAFKA = 'bus.kind = "kafka"\nbus.servers = "one:9092"\n'


def keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Yield every dotted key of a run's configuration."""
    for name, field in section.model_fields.items():
        is_union = get_origin(field.annotation) in (Union, UnionType)
        members = get_args(field.annotation) if is_union else (field.annotation,)
        sections = [t for t in members if isinstance(t, type) and issubclass(t, BaseModel)]
        for deeper in sections:
            yield from keys(deeper, f"{path}{name}.")
        if not sections:
            yield f"{path}{name}"


def covers(entry: str, key: str) -> bool:
    return key == entry or key.startswith(f"{entry}.")


@pytest.mark.parametrize("key", sorted(set(keys(RunConfig))))
def test_every_key_is_either_fixed_or_changeable(key: str) -> None:
    """A new key needs an entry in services/local/run_identity.py."""
    assert len([entry for entry in (*IDENTITY, *CHANGEABLE) if covers(entry, key)]) == 1


def test_every_entry_names_a_key() -> None:
    known = set(keys(RunConfig))
    assert [entry for entry in (*IDENTITY, *CHANGEABLE) if not any(covers(entry, key) for key in known)] == []


def resumed(tmp_path: Path, before: str, *flags: str, environment: dict[str, str] | None = None) -> RunConfig:
    home = tmp_path / "t"
    home.mkdir()
    (tmp_path / "mine.toml").write_text(before)
    (home / "run.toml").write_text(to_toml(load([str(tmp_path / "mine.toml")], {}, program="").config))
    return resolve(load(["--resume", str(home), *flags], environment or {}, program=""))


@pytest.mark.parametrize(
    "flag",
    [
        "--bus.servers=two:9093,three:9093",
        "--bus.security=sasl_tls",
        "--bus.sasl_mechanism=PLAIN",
        "--bus.ca_file=/etc/ca.pem",
        "--bus.outage_limit_s=60",
        "--bus.retention_hours=24",
        "--snapshot_store.endpoint=http://other:9000",
        "--tasks.time_limit_s=90",
        "--learner.proximal.missing=drop",
        "--learner.versions=50",
        "--local.rollout_workers=2",
    ],
)
def test_a_resumed_run_may_change_addresses_and_limits(tmp_path: Path, flag: str) -> None:
    assert resumed(tmp_path, RUN + KAFKA, flag).run.id == "t"


@pytest.mark.parametrize(
    "flag",
    [
        "--bus.kind=sqlite",
        "--bus.topic_prefix=other.",
        "--bus.task_partitions=9",
        "--learner.optimizer.lr=0.5",
        "--learner.max_staleness=1",
        "--sampling.temperature=0.5",
        "--tasks.samples_per_group=2",
    ],
)
def test_a_resumed_run_may_not_change_its_algorithm_or_data(tmp_path: Path, flag: str) -> None:
    with pytest.raises(UserError, match=f"another configuration:\n  {flag[2:].partition('=')[0]}: .* there, .* here\n"):
        resumed(tmp_path, RUN + KAFKA, flag)


def test_a_resumed_run_keeps_the_trajectory_limit_that_its_file_leaves_out(tmp_path: Path) -> None:
    """The saved run has the resolved number; the run file and a changed limit of a pass do not change it."""
    set_before = RUN + "sampling.max_trajectory_tokens = 2047\n"
    home = tmp_path / "t"
    home.mkdir()
    (home / "run.toml").write_text(to_toml(load([str(_file(tmp_path, set_before))], {}, program="").config))
    again = load([str(_file(tmp_path, RUN)), "--resume", str(home), "--learner.micro_batch_tokens=512"], {}, program="")
    assert resolve(again).sampling.max_trajectory_tokens == 2047
    other = load(
        [str(_file(tmp_path, RUN)), "--resume", str(home), "--sampling.max_trajectory_tokens=1000"], {}, program=""
    )
    with pytest.raises(UserError, match=r"sampling\.max_trajectory_tokens: 2047 there, 1000 here"):
        resolve(other)


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_an_exported_broker_does_not_block_a_run_without_one(tmp_path: Path) -> None:
    config = resumed(tmp_path, RUN, environment={"PALIMPSEST_BUS__SERVERS": "one:9092"})
    assert (config.bus.kind, config.bus.servers) == ("sqlite", "one:9092")


def test_a_kind_with_other_keys_is_compared_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(RUN)
    (tmp_path / "two.toml").write_text(RUN + 'learner.proximal.kind = "ppo_ewma_async"\n')
    one, two = (load([str(tmp_path / name)], {}, program="").config for name in ("one.toml", "two.toml"))
    found = {key: (old, new) for key, old, new in differences(one, two)}
    assert found["learner.proximal.kind"] == ("snapshot", "ppo_ewma_async")
    assert found["learner.proximal.patience"] == (None, 3)


def test_the_starting_adapter_is_part_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learner\.lora\.start: .*'one'.* there, .*'two'.* here"):
        resumed(tmp_path, RUN + 'learner.lora = { rank = 4, start = "one" }\n', "--learner.lora.start=two")
    same = load(["--resume", str(tmp_path / "t"), "--learner.lora.start=one"], {}, program="")
    assert resolve(same).learner.lora.start == Path("one")
