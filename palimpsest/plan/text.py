"""The text and the JSON of a plan. Pure."""

from typing import Any

from palimpsest.plan.causes import Cause, gib
from palimpsest.plan.gpus import CONTEXT
from palimpsest.plan.plan import Plan

WIDTH = 46


def render(plan: Plan) -> str:
    """Return the plan for a terminal."""
    model, shape, learner = plan.model, plan.shape, plan.learner
    rows = f"{shape.rows} row{'s' if shape.rows > 1 else ''} of {shape.length:,} tokens"
    if shape.rest:
        rows += f" and {shape.rest:,} of shorter ones"
    lines = [
        f"Model: {model.kind}, {_billions(model.parameters)} parameters, {gib(model.weights)} GiB in its own type",
        f"GPUs: {plan.gpus}; the run needs {plan.needed}",
        "",
        f"{f'A rank of the learner; largest pass: {rows}':{WIDTH}}{'GiB':>9}",
    ]
    lines += [_line(cause) for cause in learner.held]
    lines.append(_sum("held all the time", learner.static))
    for moment in learner.moments:
        lines += [f"in addition during: {moment.name}", *(_line(cause) for cause in moment.causes)]
    lines.append(_sum(f"peak, {learner.largest.name}", learner.peak))
    engines = f" and {plan.needed.engine_share:.0%} for engines" if plan.needed.engine_share else ""
    if plan.needed.asleep:
        engines = f" and {gib(plan.needed.asleep * CONTEXT)} for engines that sleep"
    replicas = f" and {plan.needed.replicas_beside} of replicas" if plan.needed.replicas_beside else ""
    others = f"{gib(CONTEXT)} for CUDA{engines}{replicas}"
    lines.append(_sum(f"a GPU of {plan.gpus.gib:g} GiB, less {others}", plan.learner_room))
    if learner.host:
        lines.append(_sum("in the host's memory, for each rank", sum(cause.size for cause in learner.host)))
    lines += ["", *_engine(plan), *plan.misfits()]
    if plan.fits:
        lines.append("The run fits.")
    lines += [f"With {' and '.join(keys)}: peak {gib(peak)} GiB" for keys, peak in plan.remedies]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as values for JSON, sizes in bytes."""
    return {
        "model": {"kind": plan.model.kind, "parameters": plan.model.parameters, "bytes": plan.model.weights},
        "gpus": {"number": plan.gpus.number, "usable_bytes": plan.learner_room, "needed": plan.needed.number},
        "learner": {
            "pass": {"rows": plan.shape.rows, "length": plan.shape.length},
            "held": {cause.name: cause.size for cause in plan.learner.held},
            "moments": {
                moment.name: {cause.name: cause.size for cause in moment.causes} for moment in plan.learner.moments
            },
            "host": {cause.name: cause.size for cause in plan.learner.host},
            "peak_bytes": plan.learner.peak,
            "peak_moment": plan.learner.largest.name,
        },
        "engine": None
        if plan.engine is None
        else {
            "weights_bytes": plan.engine.weights,
            "cache_bytes": plan.engine.cache,
            "cache_tokens": plan.engine.tokens(),
            "asleep_host_bytes": plan.asleep_in_host,
        },
        "fits": plan.fits,
        "misfits": plan.misfits(),
        "remedies": [{"keys": list(keys), "peak_bytes": peak} for keys, peak in plan.remedies],
    }


def _engine(plan: Plan) -> list[str]:
    engine = plan.engine
    if engine is None:
        return []
    lines = [
        f"{'Each GPU of an engine':{WIDTH}}{'GiB':>9}",
        _line(Cause("weights", engine.weights, ("rollout.engine.tensor_parallel",))),
        _line(Cause("KV cache and buffers", max(0, engine.cache), ("rollout.engine.gpu_memory_utilization",))),
    ]
    if plan.asleep_in_host:
        lines.append(_sum("in the host's memory, of all that sleep", plan.asleep_in_host))
    if engine.token:
        lines.append(
            f"The cache holds {engine.tokens():,} tokens; rollout.max_live trajectories of the greatest length have "
            f"{plan.live_tokens:,}."
        )
    return [*lines, ""]


def _line(cause: Cause) -> str:
    return f"  {cause.name:{WIDTH - 2}}{gib(cause.size):>9}  {', '.join(cause.keys)}".rstrip()


def _sum(name: str, size: int) -> str:
    return f"{name:{WIDTH}}{gib(size):>9}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
