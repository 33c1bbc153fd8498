"""Generates docs/configuration.md, docs/metrics.md, docs/messages.md from the code, the schema and the table of the
chart's values from its values.yaml, and the files of deploy/grafana from tools/dashboards.

python -m tools.references           # write the files
python -m tools.references --check   # exit with 1 if a file differs from the code
"""

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from palimpsest.common import instruments, messages, outages
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.sessions import instruments as session_instruments
from tools import chart, dashboards

ROOT = Path(__file__).resolve().parent.parent
CHART = "deploy/helm/palimpsest"
VALUES = ROOT / CHART / "values.yaml"
HEAD = ("| key | values | default | what it does |", "|---|---|---|---|")
TYPES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Path: "path"}
SERVICES = ("learner", "learner.evaluation", "learner.replica", "rollout", "snapshot_store", "env_gateway")


def main() -> int:
    """Write or check the files. Returns the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    stale = []
    for name, text in references().items():
        path = ROOT / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if stale:
        print(f"{'differs from the code; run `make docs`: ' if check else 'written: '}{', '.join(stale)}")
    return 1 if check and stale else 0


def references() -> dict[str, str]:
    """Return the text of each file by its path in the repository."""
    values = VALUES.read_text()
    return {
        "docs/configuration.md": configuration(),
        "docs/metrics.md": metrics(),
        "docs/messages.md": wire(),
        "docs/chart-values.md": chart.table(values),
        f"{CHART}/values.schema.json": chart.schema(values),
        **{f"deploy/grafana/{one.name}.json": one.json() for one in dashboards.ALL},
    }


def configuration() -> str:
    """Return the reference of configuration keys."""
    parts = [
        "# Configuration",
        (
            "One TOML file describes a run, and every service reads the same file. Flags "
            "(`--learner.optimizer.lr=3e-6`) override environment variables "
            "(`PALIMPSEST_LEARNER__OPTIMIZER__LR=3e-6`), which override the file, which overrides the defaults. "
            "`--check` prints the resolved run. A misspelled key is an error that names the nearest key. Secrets come "
            "from the environment only: the tokens of the HTTP services ([operations.md](operations.md#access)), "
            "`PALIMPSEST_KAFKA_USERNAME`, `PALIMPSEST_KAFKA_PASSWORD`, and the credentials of the S3 "
            "([operations.md](operations.md#s3-and-minio))."
        ),
        "`make docs` generates this page from common/config.",
    ]
    parts += _section(RunConfig, ())
    return "\n\n".join(parts) + "\n"


def _section(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield f"## [{'.'.join(path)}]"
        if section.__doc__:
            yield " ".join(section.__doc__.split())
    if own := {name: field for name, field in section.model_fields.items() if not _below(field.annotation)}:
        yield _table(own)
    for name, field in section.model_fields.items():
        below = _below(field.annotation)
        if len(below) > 1:
            yield from _kinds(field, (*path, name))
        elif below:
            yield from _section(below[0], (*path, name))


def _kinds(field: FieldInfo, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the parts of a section whose keys depend on its `kind`."""
    kinds = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in _below(field.annotation)}
    yield f"## [{'.'.join(path)}]"
    yield _cell(field.description or "")
    words = ", ".join(f"`{json.dumps(kind)}`" for kind in kinds)
    row = f"| `kind` | {words} | `{json.dumps(field.default.kind)}` | The other keys depend on it. |"
    yield "\n".join([*HEAD, row])
    for kind, section in kinds.items():
        yield f"### [{'.'.join(path)}] kind = {json.dumps(kind)}"
        yield " ".join((section.__doc__ or "").split())
        if own := {name: field for name, field in section.model_fields.items() if name != "kind"}:
            yield _table(own)


def _table(fields: Mapping[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {_values(field.annotation, field.metadata)} | {_default(field)} | "
        f"{_cell(field.description or '')} |"
        for name, field in fields.items()
    ]
    return "\n".join([*HEAD, *rows])


def _below(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in an annotation. A section with kinds has several."""
    return [one for one in _members(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _values(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """Return the valid values of a key as text."""
    inner = get_args(annotation)
    match get_origin(annotation) or annotation:
        case origin if origin in (Union, UnionType):
            either = " or ".join(_values(one, bounds) for one in inner if one is not NoneType)
            return either.replace("`, `", "` or `")
        case origin if origin is Annotated:
            return _values(inner[0], [bound for one in inner[1:] for bound in getattr(one, "metadata", [])])
        case origin if origin is Literal:
            return ", ".join(f"`{json.dumps(word)}`" for word in inner)
        case origin if origin is dict:
            return (
                f"table: name = {_values(inner[1])}"
                if inner[0] is str
                else f"table: {_values(inner[0])} = {_values(inner[1])}"
            )
        case origin if isinstance(origin, type) and issubclass(origin, BaseModel):
            return f"{{ {', '.join(origin.model_fields)} }}"
        case origin if origin is tuple:
            return "`[low, high]`" if inner == (float, float) else f"list: {_values(inner[0])}"
    return f"{TYPES[annotation]}{_bounded(bounds)}"


def _bounded(bounds: Sequence[Any]) -> str:
    limits = {name: f"{getattr(b, name):.15g}" for b in bounds for name in ("gt", "ge", "lt", "le") if hasattr(b, name)}
    if set(limits) == {"ge", "le"}:
        return f" from {limits['ge']} to {limits['le']}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " and".join(f" {signs[name]} {limit}" for name, limit in limits.items())


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "*required*"
    return "" if field.default is None else f"`{json.dumps(field.default, default=str)}`"


def metrics() -> str:
    """Return the reference of Prometheus metrics."""
    parts = [
        "# Metrics",
        (
            "Every service answers `GET /metrics`. Counters appear with the suffix `_total`, histograms with "
            "`_bucket`, `_sum` and `_count`. `make docs` generates this page from common/outages.py, "
            "common/instruments.py, common/sessions/instruments.py and each service's instruments.py."
        ),
        "## Alerts",
        (
            "`deploy/prometheus/rules` has recording and alerting rules. Their label `run` is a label of the scraped "
            "targets: `deploy/prometheus/prometheus.yml` shows it for one machine. Give every run its own. `severity` "
            "is `critical` if the run makes no progress, else `warning`. `deploy/prometheus/tests` shows the series "
            "on which each alert fires:"
        ),
        (
            "```text\npromtool check config deploy/prometheus/prometheus.yml\n"
            "promtool test rules deploy/prometheus/tests/*.yaml\n"
            "prometheus --config.file=deploy/prometheus/prometheus.yml --storage.tsdb.path=FOLDER\n```"
        ),
        "## Dashboards",
        (
            "`deploy/grafana` has three dashboards: pipeline (who waits for whom), exactness (old log-probs, masks and "
            "clips, gradients) and cost. Import the files in Grafana and choose the Prometheus and the run. Each panel "
            "says what to look for. Panels of features that a run does not use stay empty."
        ),
        "## every service",
        _series([outages, instruments], also=instruments.PROCESS.collect()),
    ]
    for service in SERVICES:
        parts += [f"## {service}", _series(_metrics_of(service))]
    parts += ["## env_gateway, and rollout for environments that it steps itself", _series([session_instruments])]
    return "\n\n".join(parts) + "\n"


def _series(modules: Iterable[ModuleType], *, also: Iterable[Metric] = ()) -> str:
    """Return the table of the metrics in these modules. also: metrics that a collector of prometheus_client reads."""
    rows = [
        f"| `{metric._name}` | {metric._type} | {', '.join(metric._labelnames)} | {_cell(metric._documentation)} |"
        for module in modules
        for metric in vars(module).values()
        if isinstance(metric, MetricWrapperBase)
    ]
    rows += [f"| `{one.name}` | {one.type} |  | {_cell(one.documentation.rstrip('.'))} |" for one in also]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])


def _metrics_of(service: str) -> Iterator[ModuleType]:
    """Yield the instruments.py of a service."""
    folder = importlib.import_module(f"palimpsest.services.{service}").__path__[0]
    for path in sorted(Path(folder).glob("instruments.py")):
        yield importlib.import_module(f"palimpsest.services.{service}.{path.stem}")


def wire() -> str:
    """Return the reference of messages on the log."""
    parts = [
        "# Messages",
        " ".join((messages.__doc__ or "").split("\n\n", 1)[1].split()),
        (
            "Token and log-prob arrays are packed little-endian (int32, float32). `make docs` generates this page from "
            "common/messages.py, common/cut_messages.py, common/control_messages.py, common/trajectory.py and "
            "common/rejected_record.py."
        ),
    ]
    beside = (
        ("palimpsest.common.cut_messages", None),
        ("palimpsest.common.control_messages", None),
        ("palimpsest.common.trajectory", {"Segment"}),
        ("palimpsest.common.rejected_record", {"RejectCause"}),
    )
    for module, names in ((messages, None), *((importlib.import_module(name), names) for name, names in beside)):
        for node in _classes(module, names):
            parts += _record(node, module)
    return "\n\n".join(parts) + "\n"


def _classes(module: ModuleType, names: set[str] | None) -> Iterator[ast.ClassDef]:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name == "Undecodable" or node.name.startswith("_"):
            continue
        if names is None or node.name in names:
            yield node


def _record(node: ast.ClassDef, module: ModuleType) -> Iterator[str]:
    yield f"## {node.name}"
    tag = getattr(getattr(module, node.name), "__struct_config__", None)
    yield " ".join((ast.get_docstring(node) or "").split()) + (f" Tag `{tag.tag}`." if tag and tag.tag else "")
    rows = []
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        docstring = ast.get_docstring(_wrapped(after)) if after is not None else None
        meaning = _cell(docstring or "")
        if isinstance(item, ast.AnnAssign):
            kind = _cell(ast.unparse(item.annotation))
            rows.append(f"| `{ast.unparse(item.target)}` | `{kind}` | {meaning} |")
        elif isinstance(item, ast.Assign):
            rows.append(f"| `{ast.literal_eval(item.value)}` | | {meaning} |")
    yield "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    """Return the text escaped for a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _wrapped(statement: ast.stmt) -> ast.Module:
    return ast.Module(body=[statement], type_ignores=[])


if __name__ == "__main__":
    sys.exit(main())
