"""The `env_gateway` section. docs/configuration.md is generated from the docstrings under the keys."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from palimpsest.common.config.section import Positive, PositiveFloat, Section, Service

SESSION_LEASE_S = 600.0
"""Lease of a session if `env_gateway.lease_s` is None, in seconds; less if `tasks.time_limit_s` is less."""


class AdapterConfig(Section):
    """One environment of another project (docs/adapters.md)."""

    kind: Literal["mcp", "ors", "openenv", "nemo_gym", "gymnasium", "textarena", "skyrl_gym", "tau2", "vitabench"]
    """Protocol or package."""
    url: str = ""
    """Address of the server: ors, openenv, nemo_gym, mcp (`{seed}` in it is the task seed). Of the user's model: tau2,
    vitabench."""
    command: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Program and arguments of a server process for each session: mcp."""
    id: str = ""
    """Name of the environment at the server or in the package: ors, gymnasium, textarena, skyrl_gym. Of the task set:
    tau2, vitabench."""
    split: str = "train"
    """Split of the tasks: ors, skyrl_gym, mcp, nemo_gym, tau2."""
    tasks: str = ""
    """File with the tasks (skyrl_gym, nemo_gym), or `module:Class` of an environment that gets the tools (mcp)."""
    action_field: str = ""
    """Field of the action that takes the model's text, for an environment without tools: openenv."""
    reward_range: Annotated[tuple[float, float] | None, Field(strict=False)] = None
    """Lowest and highest sum of a session's rewards. It is mapped to [0, 1]. None: [0, 1]."""
    token_variable: str = ""
    """Name of the environment variable with a bearer token for the server: ors, openenv, mcp with url. Of the user's
    model: tau2, vitabench."""
    checkout: str = ""
    """Folder of the user's own checkout: tau2, vitabench."""
    language: Literal["chinese", "english"] = "chinese"
    """Language of the tasks, tools, user and judge: vitabench."""
    user: Literal["", "none", "scripted", "model"] = ""
    """Who the user of a dialogue is: tau2. `none`: the model works alone. `scripted`: without a model.
    `model`: at `url`."""
    user_model: str = ""
    """Name of the user's model at its endpoint: tau2, vitabench."""
    user_calls: Positive = 64
    """Maximum number of requests to the user's model in a session, with each retry: tau2, with each judgement,
    and vitabench."""
    user_tokens: Positive = 1_000_000
    """Maximum number of tokens of prompts and completions of the user's model in a session: tau2,
    vitabench."""
    user_limit_s: PositiveFloat = 60.0
    """Time limit of one request to the user's model, in seconds: tau2, vitabench."""
    user_session_s: PositiveFloat = 600.0
    """Maximum time that a session spends at the user's model, in seconds, with the pauses before retries: tau2,
    vitabench."""
    judge_url: str = ""
    """Address of the judge's model: vitabench."""
    judge_token_variable: str = ""
    """Name of the environment variable with a bearer token for the judge's model: vitabench."""
    judge_model: str = ""
    """Name of the judge's model at its endpoint: vitabench."""
    judge_calls: Positive = 64
    """Maximum number of requests to the judge's model in a session, with each retry: vitabench."""
    judge_tokens: Positive = 1_000_000
    """Maximum number of tokens of prompts and completions of the judge's model in a session: vitabench."""
    judge_limit_s: PositiveFloat = 60.0
    """Time limit of one request to the judge's model, in seconds: vitabench."""
    judge_session_s: PositiveFloat = 600.0
    """Maximum time that a session spends at the judge's model, in seconds, with the pauses before retries:
    vitabench."""
    evaluation: Literal["all", "environment"] = "all"
    """What is scored: tau2. `environment`: the database and its assertions alone."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> "AdapterConfig":
        if self.reward_range is not None and not self.reward_range[0] < self.reward_range[1]:
            raise ValueError(f"reward_range {list(self.reward_range)}: the first number must be less than the second")
        return self


class EnvGatewayConfig(Service):
    """The gateway to the environments."""

    url: str = ""
    """URL at which rollout workers reach the gateway. Default: http://host:port."""
    lease_s: PositiveFloat | None = None
    """Lease of a session, in seconds. A session without a request for this time expires. A worker renews the leases of
    its sessions, so the lease need not cover a long model message. At most tasks.time_limit_s. None: 600, or
    tasks.time_limit_s if that is less."""
    step_limit_s: PositiveFloat = 60.0
    """Time limit of a step, in seconds. A longer step ends the session with status `error`. At most
    tasks.time_limit_s."""
    max_sessions: Positive = 4096
    """Maximum number of sessions. The gateway refuses more with 429."""
    remember_s: PositiveFloat = 600.0
    """Time for which the gateway keeps an ended session, in seconds. A late retry gets the stored reply. At least
    env_gateway.step_limit_s, because a client may wait for that long before it retries."""
    request_limit_bytes: Positive = 1048576
    """Maximum size of a request. The gateway refuses larger requests with 413."""
    result_limit_bytes: Positive = 65536
    """Maximum size of a tool result. Longer results are truncated, with a note in the text."""
    session_turns: Positive = 64
    """Maximum number of model messages in a session. The last one is applied; then the session is truncated and scored.
    At least sampling.max_turns."""
    session_calls: Positive = 512
    """Maximum number of tool calls in a session. The message that exceeds it is not applied; the session is truncated
    and scored."""
    session_output_bytes: Positive = 16777216
    """Maximum size of all texts that the environment returns in a session, before result_limit_bytes truncates them.
    Beyond it, the session is truncated and scored."""
    plugins: dict[str, str] = {}
    """Additional environments: name -> `package.module:Class`. Each of their sessions runs in a separate process."""
    adapters: dict[str, AdapterConfig] = {}
    """Environments of other projects: name -> `{ kind, ... }`. docs/adapters.md has the keys of each kind. Each of
    their sessions runs in a separate process."""
    plugin_variables: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of environment variables that the processes of plugins receive, for example `["TAU2_DATA_DIR"]`. Without
    this key they receive only the usual ones, such as PATH, HOME and the locale (docs/gateway.md)."""
    max_processes: Positive = 64
    """Maximum number of concurrent sessions in separate processes. Further sessions wait."""
    child_memory_mib: Positive = 8192
    """Address space of one process of a session, in MiB, with what the gateway loaded for all sessions."""
    child_processes: Positive = 256
    """Processes and threads of a session. Needs `child_user` as root, user namespaces otherwise."""
    child_files: Annotated[int, Field(ge=16)] = 512
    """Open files and sockets of one process of a session."""
    child_file_mib: Positive = 1024
    """Size of a file that a session's process writes, in MiB."""
    child_user: Annotated[int, Field(ge=1000, lt=2**31)] | None = None
    """First of 1000 user ids that the sessions get if the gateway runs as root. These users must be able to read Python
    and the environments. None: the gateway's user."""
    child_network: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of plugins and adapters whose processes may use the network. Adapters with a `url` always may. The others
    have none where the machine can take it from them."""
    child_hosts: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = {}
    """What plugins and adapters reach without a network: name -> `["host:port", ...]`. Their processes reach these
    addresses through a proxy of the gateway and nothing else (docs/environment-limits.md)."""
    code_tools: Literal["off", "bubblewrap"] = "off"
    """Whether environments may run programs that the model wrote. `bubblewrap`: in a sandbox of bubblewrap, without
    a network and without the machine's files; the gateway refuses to start if it cannot make one. Needs `child_user` as
    root (docs/environment-limits.md)."""
    code_python: str = ""
    """Path of the Python that runs these programs. Empty: the gateway's own. The user of a session must be able to read
    it."""
    isolation: Literal["available", "required"] = "available"
    """`available`: enforce what the machine permits; the log says at the start what is missing. `required`: refuse to
    start if the network, the number of processes or the user cannot be separated (docs/environment-limits.md)."""

    @model_validator(mode="after")
    def _replies_outlast_steps(self) -> "EnvGatewayConfig":
        if self.remember_s < self.step_limit_s:
            raise ValueError(
                f"env_gateway.remember_s ({self.remember_s}) is less than env_gateway.step_limit_s "
                f"({self.step_limit_s}): a retry could come after the reply is forgotten"
            )
        return self

    def check_sessions(self, *, max_turns: int, time_limit_s: float) -> None:
        """Check that sessions last as long as trajectories and groups may. Raises ValueError.

        max_turns: sampling.max_turns. time_limit_s: tasks.time_limit_s.
        """
        if self.lease_s is not None and self.lease_s > time_limit_s:
            raise ValueError(
                f"env_gateway.lease_s ({self.lease_s}) is more than tasks.time_limit_s ({time_limit_s}): the session "
                f"of a dead worker would keep its place after its group is dropped"
            )
        if self.step_limit_s > time_limit_s:
            raise ValueError(
                f"env_gateway.step_limit_s ({self.step_limit_s}) is more than tasks.time_limit_s ({time_limit_s}): a "
                f"step that the gateway permits would end after its group is dropped"
            )
        if max_turns > self.session_turns:
            raise ValueError(
                f"sampling.max_turns ({max_turns}) is more than env_gateway.session_turns ({self.session_turns}): "
                f"sessions would end earlier than the trajectories may"
            )
