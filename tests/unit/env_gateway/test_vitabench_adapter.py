"""The adapter of VitaBench without the package: what it refuses, its two endpoints, and what counts as a verdict."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.services.env_gateway.adapters import entries, vitabench_models
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable
from palimpsest.services.env_gateway.adapters.limited_endpoint import EndpointFailed
from palimpsest.services.env_gateway.adapters.model_endpoints import judge_endpoint, user_endpoint
from palimpsest.services.env_gateway.adapters.vitabench_models import Counter, JudgeFailed, Verdicts, judged
from palimpsest.services.env_gateway.processes.pool import Pool
from tests.servers import outlined_checkouts, vita_models
from tests.servers.chat_endpoint import ChatEndpoint, spoken
from tests.servers.outlined_checkouts import one_child, outlined

ENDPOINTS = {"url": "http://127.0.0.1:9", "user_model": "m", "judge_url": "http://127.0.0.1:9", "judge_model": "j"}
REGISTRY = """
class Registry:
    def get_task_sets(self):
        return ["delivery", "ota"]

    def get_tasks_loader(self, name):
        return lambda language: open(DATA / name / language)


registry = Registry()
"""


def settings(**keys: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"kind": "vitabench", **ENDPOINTS, **keys})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return outlined(tmp_path / "vitabench", "vita", REGISTRY)


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with one_child(getattr(request, "param", ())) as pool:
        yield pool


def refusal(pool: Pool, checkout: Path, **keys: str) -> str:
    return outlined_checkouts.refusal(pool, settings(checkout=str(checkout), **keys))


@pytest.mark.servers
def test_what_a_checkout_lacks_is_named(pool: Pool, checkout: Path, tmp_path: Path) -> None:
    absent = refusal(pool, tmp_path / "absent", id="delivery")
    assert f"{tmp_path}/absent is no checkout of VitaBench: it has no src/vita/registry.py" in absent
    assert "clone meituan-longcat/vitabench instead" in absent
    assert "no task set 'instore', only delivery, ota" in refusal(pool, checkout, id="instore")
    missing = refusal(pool, checkout, id="ota", language="english")
    assert "the checkout lacks data of ota (english)" in missing
    assert str(checkout / "data" / "ota" / "english") in missing
    (checkout / "src" / "vita" / "__init__.py").write_text("import absent_requirement\n")
    needs = refusal(pool, checkout, id="ota")
    assert "No module named 'absent_requirement'; install the requirements of the checkout" in needs


@pytest.mark.servers
@pytest.mark.parametrize("pool", [("vita",)], indirect=True)
def test_the_unrelated_package_is_refused_by_its_name(
    pool: Pool, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else imported it in the gateway, so the checkout's own would not be found."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "vita.py").write_text('"""A synthesizer."""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    text = refusal(pool, checkout, id="delivery")
    assert f"the module vita comes from {tmp_path}/installed/vita.py, not from {checkout}" in text
    assert "uninstall the package `vita` of the Python registry, which is an unrelated one" in text


def test_user_and_judge_have_endpoints_and_limits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_JUDGE", "two")
    answer = lambda _: spoken("yes", usage=vita_models.USAGE)  # noqa: E731
    with ChatEndpoint(answer) as user, ChatEndpoint(answer) as judge:
        both = settings(url=user.url, judge_url=judge.url, user_calls=1, judge_calls=2, judge_token_variable="OF_JUDGE")
        of_user, of_judge = user_endpoint(both), judge_endpoint(both)
        vitabench_models.check(of_user, "m")
        with pytest.raises(EndpointFailed, match="has made 1 requests"):
            vitabench_models.check(of_user, "m")
        vitabench_models.check(of_judge, "j")
        vitabench_models.check(of_judge, "j")
    assert (user.tokens, judge.tokens) == ([None], ["Bearer two", "Bearer two"])
    assert [request["model"] for request in [*user.requests, *judge.requests]] == ["m", "j", "j"]
    limits = settings(judge_tokens=3, judge_session_s=2.0, judge_limit_s=1.0)
    assert judge_endpoint(limits)._limits.tokens == 3
    assert (judge_endpoint(limits)._limits.seconds, judge_endpoint(limits)._limits.request_s) == (2.0, 1.0)
    assert entries.variables({"a": both, "b": settings(token_variable="OF_USER")}) == ("OF_JUDGE", "OF_USER")


@pytest.mark.parametrize(
    ("key", "made", "named"),
    [("url", user_endpoint, "`url` and `user_model`"), ("user_model", user_endpoint, "`url` and `user_model`"),
     ("judge_url", judge_endpoint, "`judge_url` and `judge_model`"),
     ("judge_model", judge_endpoint, "`judge_url` and `judge_model`")],
)  # fmt: skip
def test_a_missing_endpoint_is_named(key: str, made: Any, named: str) -> None:
    with pytest.raises(AdapterUnusable, match=f"of vitabench needs the keys {named}"):
        made(settings(**{key: ""}))


def test_a_reply_with_calls_of_tools_is_no_text() -> None:
    calls = spoken(None, calls=(("order", {}),))
    with ChatEndpoint(lambda _: calls) as model, pytest.raises(EndpointFailed, match="calls tools"):
        vitabench_models.check(user_endpoint(settings(url=model.url)), "m")


ROW = {"rubric_idx": "rubric_0", "rubric": "It is red.", "meetExpectation": False}


@pytest.mark.parametrize(
    "found",
    ["", [], {}, ROW, [ROW, "and"], [{"rubric_idx": "rubric_0"}], [ROW | {"meetExpectation": "yes"}],
     [ROW | {"rubric_idx": 0}], None],
)  # fmt: skip
def test_a_reply_without_verdicts_is_a_failure_of_the_judge(found: Any) -> None:
    assert judged([ROW, ROW | {"rubric_idx": "rubric_1"}], "") == {"rubric_0", "rubric_1"}
    with pytest.raises(
        JudgeFailed, match=r"no list of `rubric_idx` with `meetExpectation` true or false: It is fine\."
    ):
        judged(found, "It is fine.")


def test_each_rubric_needs_a_verdict_of_any_window(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("evaluator_of_the_test")
    vars(module)["evaluator_extracter"] = json.loads
    monkeypatch.setitem(sys.modules, module.__name__, module)
    verdicts = Verdicts(module=module.__name__)
    verdicts.check(0)
    read = vars(module)["evaluator_extracter"]
    assert read(json.dumps([ROW])) == [ROW]
    with pytest.raises(JudgeFailed, match="no list of"):
        read("It is fine.")
    with pytest.raises(JudgeFailed, match="no verdict on 2 of 3 rubrics: rubric_1, rubric_2"):
        verdicts.check(3)
    read(
        json.dumps([ROW | {"rubric_idx": "rubric_2"}, ROW | {"rubric_idx": "rubric_1"}, ROW | {"rubric_idx": "other"}])
    )
    verdicts.check(3)


def test_order_numbers_differ_within_a_session_and_not_between_sessions() -> None:
    one, other = Counter(), Counter()
    assert [one.now(), one.now()] == [other.now(), other.now()]
    assert one.now() != one.now()
