"""Checks of plugins before the gateway listens, without loading them."""

import pytest

from palimpsest.common.sessions.registry import built_in
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.env_gateway.plugins import blueprints, check_tasks


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Upper", "package.module:Class"),
        ("a b", "package.module:Class"),
        ("../up", "package.module:Class"),
        ("x" * 65, "package.module:Class"),
        ("lookup", "package.module:Class"),
        ("reasoning_gym.chain_sum", "package.module:Class"),
        ("mine", "package.module"),
        ("mine", "package/module.py:Class"),
        ("mine", "package.module:"),
        ("mine", "package.module:Class()"),
    ],
)
def test_an_invalid_plugin_is_refused_with_its_key(name: str, path: str) -> None:
    with pytest.raises(UserError) as error:
        blueprints({name: path}, taken=built_in())
    assert str(error.value).startswith(f"env_gateway.plugins.{name}: ")
    assert error.value.code is ExitCode.CONFIGURATION


def test_a_plugin_is_a_path_to_a_class() -> None:
    found = blueprints({"mine": "package.module:Class", "other.one-2": "m:C"}, taken=built_in())
    assert {name: (plan.path, plan.module) for name, plan in found.items()} == {
        "mine": ("package.module:Class", "package.module"),
        "other.one-2": ("m:C", "m"),
    }


def test_a_reasoning_gym_environment_without_the_package_names_the_extra() -> None:
    with pytest.raises(UserError, match=r"reasoning-gym is not installed: .* the extra \[reasoning-gym\]"):
        check_tasks(["reasoning_gym.chain_sum"], built_in())


def test_an_unknown_environment_is_refused_with_the_nearest_name() -> None:
    check_tasks(["lookup", "add"], built_in())
    with pytest.raises(
        UserError, match=r"tasks.environments: the gateway has no environment 'lokup'; did you mean lookup\?"
    ):
        check_tasks(["add", "lokup"], built_in())
