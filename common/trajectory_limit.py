"""The length limit of a trajectory: `sampling.max_trajectory_tokens`, or what the model and the run's passes hold.

Every service calls `trajectory_limit`. A folder is read as JSON; the files of a hub id are downloaded.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.model_limits import engine_tokens, positions
from palimpsest.common.model_path import refuse_absent, sentence
from palimpsest.common.user_error import UserError

KEY = "sampling.max_trajectory_tokens"


@dataclass(frozen=True, slots=True)
class TrajectoryLimit:
    """Maximum length of a trajectory in tokens, and where it comes from."""

    tokens: int
    source: str
    """As the end of a sentence: `from SOURCE`."""

    def refuse_other(self, offered: int, *, worker: str) -> None:
        """Raise UserError if the learner offers another limit: the two have different models or keys."""
        if offered != self.tokens:
            raise UserError(
                f"{KEY} is {self.tokens} on {worker}, from {self.source}, but the learner offers trajectories of up to "
                f"{offered} tokens. Give learner and worker the same model folder and the same run file, or set {KEY}"
            )


def trajectory_limit(config: RunConfig) -> TrajectoryLimit:
    """Return the limit of the run. Raises UserError if the model's files cannot be read or no prompt would fit.

    Without `sampling.max_trajectory_tokens` it is the smallest of: the model's positions, the tokenizer's
    model_max_length, max_length of generation_config.json, learner.micro_batch_tokens, and the tokens of one engine
    step. A longer row would enlarge the learner's pass and the engine's buffers beyond what their keys allow.
    """
    given, sampling = config.sampling.max_trajectory_tokens, config.sampling
    if given is not None:
        return TrajectoryLimit(given, "the configuration")
    path = config.model.path
    refuse_absent(path)
    limits = list(_limits(config, _files(path)))
    tokens, source = min(limits, key=lambda limit: limit[0])
    if sampling.max_turn_tokens >= tokens:
        raise UserError(
            f"sampling.max_turn_tokens ({sampling.max_turn_tokens}) leaves no room for a prompt in {KEY}, which is "
            f"{tokens}, from {source}. Lower sampling.max_turn_tokens, or choose a model.path with more positions"
        )
    return TrajectoryLimit(tokens, source)


def with_limit(config: RunConfig) -> RunConfig:
    """Return the run with the limit filled in. Raises UserError, as `trajectory_limit`."""
    sampling = config.sampling.model_copy(update={"max_trajectory_tokens": trajectory_limit(config).tokens})
    return config.model_copy(update={"sampling": sampling})


def resolved_toml(config: RunConfig) -> str:
    """Return the run as TOML, with a first line that states the limit and its source if the run does not set it.

    Nothing is downloaded: without a local folder the line says that the limit follows when the run starts.
    """
    if config.sampling.max_trajectory_tokens is not None:
        return to_toml(config)
    if not Path(config.model.path).is_dir():
        return f"# {KEY} comes from the model when the run starts: {config.model.path} is no folder here\n" + to_toml(
            config
        )
    limit = trajectory_limit(config)
    return f"# {KEY} = {limit.tokens}, from {limit.source}\n" + to_toml(with_limit(config))


def _limits(config: RunConfig, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield each limit and its source. The first of equal limits is the one to name."""
    engine, more = config.rollout.engine, engine_tokens(config)
    less = f", less the {more} token that the engine adds" if more else ""
    if (found := positions(files["config.json"])) is not None:
        yield found[0] - more, f"the {found[0]} positions of the model ({found[1]} in config.json{less})"
    for name, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        value = files[name].get(key)
        if isinstance(value, int) and value > 0:  # without a limit, transformers writes 10**30
            yield value, f"{key} in {name} of the model"
    learner = config.learner.micro_batch_tokens
    yield learner, f"learner.micro_batch_tokens ({learner})"
    if isinstance(engine, VllmEngineConfig):
        step = engine.max_concurrent_tokens
        yield step - more, f"rollout.engine.max_concurrent_tokens ({step}{less})"


def _files(path: str) -> dict[str, Mapping[str, Any]]:
    """Return the JSON objects of the model's files; an empty one for a file that the model does not have."""
    names = ("config.json", "tokenizer_config.json", "generation_config.json")
    if Path(path).is_dir():
        return {name: _object(Path(path) / name) for name in names}
    from transformers.utils.hub import cached_file

    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        try:
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=name == names[0])
        except Exception as error:
            raise UserError(
                f"model.path: {name} of {path} cannot be read ({sentence(error)}), so its limits are unknown: set "
                f"{KEY}, or make the model available"
            ) from None
        found[name] = _object(Path(file)) if file else {}
    return found


def _object(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file; empty if there is none: the code that uses the file refuses it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
