"""Typed functions as tools: the JSON schema follows from the annotations and the docstring, and calls are checked.

    @tool
    def add(state: Basket, item: str, count: int = 1) -> str:
        \"\"\"Put an item into the basket.

        item: Name of the item.
        count: Number of pieces.
        \"\"\"

A first parameter named `state` (or `self`, for a method of the state's class) receives the state of the session and is
not part of the schema. Descriptions of parameters may also stand below `Args:` or have the form `:param item: ...`.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, create_model

from palimpsest.common.environments import port
from palimpsest.common.environments.single_call import ToolFailed

STATE = ("state", "self")
MAX_PROBLEM = 500
"""Longest text about wrong arguments, in characters."""
_PARAMETER = re.compile(r"^(\s*)(?::param\s+)?(\w+)\s*(?:\([^)]*\))?:\s+(\S.*)$")
_SECTION = re.compile(r"^\s*(args|arguments|parameters|returns?|raises?):\s*$", re.IGNORECASE)
_ANY: TypeAdapter[Any] = TypeAdapter(Any)


class NoSchema(TypeError):
    """A function cannot be a tool; the text names the function, the problem and the remedy."""


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model can call. It stays callable as a function."""

    function: Callable[..., Any]
    schema: Mapping[str, Any]
    """In the format of chat templates."""
    arguments: type[BaseModel]
    """Checks the model's arguments. Its fields have the parameters' names as aliases."""
    has_state: bool
    runs_programs: bool = False
    """Whether it runs programs of the model, for which env_gateway.code_tools must be on."""

    @property
    def name(self) -> str:
        """The name for the model."""
        return str(self.schema["function"]["name"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def run(self, state: Any, arguments: Mapping[str, Any]) -> str:
        """Call the function with the model's arguments and return the text for the model. Raises ToolFailed."""
        try:
            checked = self.arguments.model_validate_json(json.dumps(arguments), strict=True)
        except ValidationError as error:
            raise ToolFailed(_problem(error)) from None
        given = {
            field.alias or "": getattr(checked, name)
            for name, field in type(checked).model_fields.items()
            if name in checked.model_fields_set
        }
        returned = self.function(state, **given) if self.has_state else self.function(**given)
        return returned if isinstance(returned, str) else _ANY.dump_json(returned).decode()


@overload
def tool(name: Callable[..., Any]) -> FunctionTool:
    """Make a typed function a tool."""


@overload
def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """Return the schema of a tool whose parameters are all strings."""


def tool(name: Callable[..., Any] | str, description: str = "", **parameters: str) -> FunctionTool | dict[str, Any]:
    """Make a typed function a tool (`@tool`), or return the schema of a tool whose parameters are all strings.

    Raises NoSchema if the function's parameters have no JSON schema.
    """
    if isinstance(name, str):
        return port.tool(name, description, **parameters)
    return function_tool(name)


def function_tool(function: Callable[..., Any] | FunctionTool, *, runs_programs: bool = False) -> FunctionTool:
    """Return the tool of a function. Raises NoSchema."""
    if isinstance(function, FunctionTool):
        return function
    name = getattr(function, "__name__", "")
    where = f"tool {getattr(function, '__qualname__', repr(function))}"
    if not inspect.isroutine(function) or not name.isidentifier():
        raise NoSchema(f"{where}: a tool is a function with a name")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise NoSchema(f"{where}: a tool is a plain function, not a coroutine or a generator")
    parameters = list(inspect.signature(function).parameters.values())
    has_state = bool(parameters) and parameters[0].name in STATE
    described = parameters[has_state:]
    about, texts = _documented(where, function, [parameter.name for parameter in described])
    model = _arguments(where, name, function, described, texts)
    try:
        body = _without_titles(model.model_json_schema())
    except PydanticUserError as error:
        raise NoSchema(f"{where}: {str(error).splitlines()[0]}; use types that JSON has") from None
    body.pop("description", None)
    body.pop("additionalProperties", None)
    schema = {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": {"properties": {}, "required": [], **body}},
    }
    return FunctionTool(function, schema, model, has_state, runs_programs)


def _arguments(
    where: str, name: str, function: Callable[..., Any], parameters: list[inspect.Parameter], texts: Mapping[str, str]
) -> type[BaseModel]:
    """Return the model that checks the arguments. Raises NoSchema."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise NoSchema(f"{where}: an annotation names something that its module does not have: {error}") from None
    fields: dict[str, Any] = {}
    for number, parameter in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise NoSchema(f"{where}: parameter {parameter} has no schema; give each parameter a name and a type")
        if parameter.name not in hints:
            raise NoSchema(f"{where}: parameter {parameter.name} has no type; annotate it, for example `: str`")
        default = ... if parameter.default is parameter.empty else parameter.default
        field = Field(default, alias=parameter.name, description=texts.get(parameter.name))
        fields[f"p{number}"] = (hints[parameter.name], field)
        try:
            create_model(name, p=(hints[parameter.name], ...)).model_json_schema()
        except PydanticUserError:
            shown = getattr(hints[parameter.name], "__name__", hints[parameter.name])
            raise NoSchema(
                f"{where}: parameter {parameter.name} has the type {shown}, which has no JSON schema; use str, int, "
                f"float, bool, Literal, Enum, list, dict, a dataclass, a TypedDict or a pydantic model"
            ) from None
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    return model


def _documented(where: str, function: Callable[..., Any], names: list[str]) -> tuple[str, dict[str, str]]:
    """Return the description of the function and those of its parameters. Raises NoSchema."""
    documentation = inspect.getdoc(function) or ""
    about: list[str] = []
    texts: dict[str, str] = {}
    current, indent, section = "", 0, ""
    for line in documentation.splitlines():
        if heading := _SECTION.match(line):
            section, current = heading[1].lower(), ""
            continue
        found = _PARAMETER.match(line)
        if found and (found[2] in names or section in ("args", "arguments", "parameters")):
            if found[2] in names:
                current, indent = found[2], len(found[1])
                texts[current] = found[3].strip()
                continue
            if not current or len(found[1]) <= indent:
                raise NoSchema(f"{where}: its docstring describes {found[2]}, which is not a parameter")
        if current and line.strip() and len(line) - len(line.lstrip()) > indent:
            texts[current] += f" {line.strip()}"
        elif not texts and not section:
            about.append(line.strip())
        else:
            current = ""
    text = " ".join(" ".join(about).split())
    if not text:
        raise NoSchema(f"{where}: it has no docstring; the model needs a description of the tool")
    return text, texts


def _without_titles(schema: Any) -> Any:
    """Return the schema without the titles that pydantic adds; a parameter may be named `title`."""
    if isinstance(schema, list):
        return [_without_titles(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _without_titles(one) for name, one in value.items()}
        if key in ("properties", "$defs")
        else (value if key in ("default", "const", "enum", "examples") else _without_titles(value))
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def _problem(error: ValidationError) -> str:
    """Describe wrong arguments to the model."""
    texts = []
    for one in error.errors(include_url=False, include_input=False):
        place = ".".join(map(str, one["loc"])) or "arguments"
        text = {"missing": "is missing", "extra_forbidden": "there is no such argument"}.get(one["type"], one["msg"])
        texts.append(f"{place}: {text}")
    return f"wrong arguments: {'; '.join(texts)}"[:MAX_PROBLEM]
