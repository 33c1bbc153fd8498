"""`palimpsest plan`: the memory that a run needs on each GPU, and the keys that change it."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from palimpsest.common.config import RunConfig, load
from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.model_limits import refuse_limits
from palimpsest.common.trajectory_limit import with_limit
from palimpsest.common.user_error import UserError
from palimpsest.plan import text
from palimpsest.plan.causes import Memory
from palimpsest.plan.engine_memory import engine_memory
from palimpsest.plan.gpus import CONTEXT, Gpus, needed, parse
from palimpsest.plan.learner_memory import learner_memory, most_rows, pass_shape
from palimpsest.plan.plan import Plan
from palimpsest.plan.rehearsal import PassShape, Rehearsed, rehearse

PROGRAM = "palimpsest plan"
USAGE = f"""\
usage: {PROGRAM} RUN.toml --gpus NUMBERxGIB [--json] [--SECTION.KEY=VALUE ...]

Print the memory that a run needs on each GPU of a machine, by cause, what does not fit, and which keys to change. The
passes of the learner are rehearsed without data, so the plan needs no GPU and reads only the model's config.json.

  --gpus 8x80   eight GPUs with 80 GiB each
  --json        print the plan as JSON

Exits with 1 if the run does not fit."""


def run_command(arguments: Sequence[str]) -> tuple[str, int]:
    """Return the text of the plan and the exit code. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        return USAGE, 0
    given, rest = _options(arguments)
    gpus, config = parse(given["gpus"]), load(rest, os.environ, program=PROGRAM).config
    refuse_limits(config)
    plan = make_plan(config, gpus)
    rendered = json.dumps(text.as_json(plan), indent=2) if "json" in given else text.render(plan)
    return rendered, 0 if plan.fits else 1


def make_plan(config: RunConfig, gpus: Gpus) -> Plan:
    """Rehearse the run's largest passes and return its plan. Raises UserError."""
    config = with_limit(config)
    longest = config.sampling.max_trajectory_tokens
    assert longest is not None
    shape = pass_shape(config.learner, longest, config.model.attention, most_rows=most_rows(config))
    rehearsed = rehearse(config.model.path, shape)
    model, memory = rehearsed.model, _learner(config, shape, rehearsed)
    engine = config.rollout.engine
    places = needed(config, gpus)
    replica = CONTEXT + model.weights + rehearsed.scoring
    room = beside = gpus.usable_beside(places.engine_share, places.replicas_beside * replica)
    if places.asleep:  # a sleeping engine keeps its CUDA context
        room = gpus.usable_beside(0.0, places.replicas_beside * replica + places.asleep * CONTEXT)
    remedies = () if memory.peak <= room else tuple(_remedies(config, longest))
    return Plan(
        gpus=gpus,
        model=model,
        shape=shape,
        learner=memory,
        engine=engine_memory(engine, model.weights, _text_config(config.model.path), gpus)
        if isinstance(engine, VllmEngineConfig)
        else None,
        needed=places,
        learner_room=room,
        awake_room=beside,
        remedies=remedies,
        live_tokens=config.rollout.max_live * longest,
    )


def _learner(config: RunConfig, shape: PassShape, rehearsed: Rehearsed) -> Memory:
    ranks, samples = config.local.learner_ranks, config.tasks.samples_per_group
    return learner_memory(config.learner, rehearsed, shape, ranks=ranks, samples=samples, gpu=True)


def _remedies(config: RunConfig, longest: int) -> list[tuple[tuple[str, ...], int]]:
    """Try the keys that cost least, one after the other, and return each combination with its peak."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if not config.learner.activation_checkpointing:
        changes.append(("learner.activation_checkpointing = true", {"activation_checkpointing": True}))
    elif config.learner.activation_checkpointing_every > 1:
        key = "activation_checkpointing_every"
        changes.append((f"learner.{key} = 1", {key: 1}))
    if longest < config.learner.micro_batch_tokens:
        changes.append((f"learner.micro_batch_tokens = {longest}", {"micro_batch_tokens": longest}))
    if config.learner.sharding == "none" and config.local.learner_ranks > 1:
        changes.append(('learner.sharding = "full"', {"sharding": "full"}))
    if config.learner.offload == "none":
        changes.append(('learner.offload = "optimizer"', {"offload": "optimizer"}))
    tried, found = [], []
    for name, change in changes:
        if (changed := _changed(config, change)) is None:
            continue
        config = changed
        tried.append(name)
        shape = pass_shape(config.learner, longest, config.model.attention, most_rows=most_rows(config))
        found.append((tuple(tried), _learner(config, shape, rehearse(config.model.path, shape)).peak))
    return found


def _changed(config: RunConfig, change: Mapping[str, Any]) -> RunConfig | None:
    """Return the run with other keys of the learner; None if they do not fit its other keys."""
    try:
        learner = LearnerConfig.model_validate({**config.learner.model_dump(), **change})
    except ValidationError:
        return None
    return config.model_copy(update={"learner": learner})


def _text_config(path: str) -> Mapping[str, Any]:
    from transformers import AutoConfig

    values: Mapping[str, Any] = AutoConfig.from_pretrained(path).get_text_config().to_dict()
    return values


def _options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split off --gpus and --json. Raises UserError."""
    given, rest = {}, []
    words = iter(arguments)
    for word in words:
        name, separator, value = word.partition("=")
        if name == "--gpus":
            given["gpus"] = value if separator else next(words, "")
        elif word == "--json":
            given["json"] = ""
        else:
            rest.append(word)
    if not arguments:
        raise UserError(USAGE)
    if "gpus" not in given or not rest or rest[0].startswith("-"):
        raise UserError(f"{PROGRAM} {' '.join(arguments)}: RUN.toml and --gpus are needed\n{USAGE}")
    return given, rest
