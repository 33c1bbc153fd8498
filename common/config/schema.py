"""Every key of the configuration, with its default and its documentation.

`make docs` generates docs/configuration.md from the docstrings under the keys.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from palimpsest.common import run_folder
from palimpsest.common.config.agents import Agents
from palimpsest.common.config.bus import BusConfig
from palimpsest.common.config.engines import ScriptedEngineConfig, VllmEngineConfig, refusal_of_sleep
from palimpsest.common.config.env_gateway import SESSION_LEASE_S, EnvGatewayConfig
from palimpsest.common.config.evaluation import EvaluationConfig
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.local import LocalConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.section import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    FilePath,
    Positive,
    PositiveFloat,
    Section,
    Service,
)
from palimpsest.common.config.tracking import TrackingConfig


class Run(Section):
    """The name of the run and its files."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$|^$")] = ""
    """Name of the run. If empty, `palimpsest run` derives it from the start time. Services started by hand need a
    name."""
    folder: FilePath = Path("runs")
    """Parent folder. A run keeps its log, snapshots, checkpoints and report in `folder/id`."""
    seed: int = 0
    """Seed of the tasks, the minibatch order and the initial random state."""
    export: bool = True
    """Export the last version of a finished run as a Hugging Face model to `folder/id/model` (`palimpsest run`
    only)."""

    @property
    def home(self) -> Path:
        """Folder of this run."""
        return self.folder / self.id


class Model(Section):
    """The policy."""

    path: str
    """Folder (or hub id) of a Hugging Face causal LM with a tokenizer and a chat template."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of the learner. `eager` is fastest for short sequences on a CPU."""
    chat_template: str = ""
    """File of the chat template to use in place of the model's own, or `tools` for the bundled template with tools
    (docs/models.md). If empty, the model's own template is used."""
    chat_template_options: dict[str, str | int | float | bool] = {}
    """Options for the chat template, for example `enable_thinking = false` for Qwen3."""


class Tasks(Section):
    """The tasks of the training."""

    environments: dict[str, PositiveFloat]
    """Environment name -> its relative share of the groups, for example `{ lookup = 1.0 }`."""
    samples_per_group: Annotated[int, Field(ge=2)] = 8
    """Trajectories sampled for each task. They form a group and share a baseline."""
    seeds: Literal["random", "counted"] = "random"
    """Seeds of the tasks. `random` draws each from run.seed and the number of the group. `counted` gives each
    environment the seeds 0, 1, 2 and so on, so that a dataset is read in epochs (docs/gateway.md). Both are functions
    of the number of the group, so a resumed run continues with the next seed."""
    time_limit_s: PositiveFloat = 600.0
    """Time limit of a group, in seconds. The learner drops trajectories that arrive later."""


class SamplingConfig(Section):
    """How tokens are sampled for training."""

    temperature: Annotated[float, Field(gt=0, le=HIGHEST_TEMPERATURE)] = 1.0
    """Sampling temperature, 0.01 to 100. The inference engine and the learner compute log-probs at this
    temperature."""
    top_p: float = 1.0
    """Must be 1. Below 1 the engine renormalizes over a token set that the learner cannot reconstruct."""
    top_k: int = 0
    """Must be 0 (off), for the same reason as top_p."""
    max_turn_tokens: Positive = 512
    """Maximum length of a model message in tokens, stop token included. A longer message is cut here and ends the
    trajectory; the environment does not execute it."""
    max_trajectory_tokens: Positive | None = None
    """Maximum length of a trajectory in tokens, prompt and tool output included. Default: the smallest limit of the
    model (its positions, model_max_length of its tokenizer, max_length of generation_config.json), at most
    learner.micro_batch_tokens and one engine step (rollout.engine.max_concurrent_tokens). `palimpsest check` prints
    the number and its source."""
    max_turns: Positive = 16
    """Maximum number of model messages in one trajectory."""

    @field_validator("temperature")
    @classmethod
    def _engine_keeps_it(cls, value: float) -> float:
        if value < LOWEST_TEMPERATURE:
            raise ValueError(
                f"{value} cannot be used for training: vLLM samples at {LOWEST_TEMPERATURE} instead, and the learner "
                f"would compute log-probs at {value}. Set it to at least {LOWEST_TEMPERATURE}"
            )
        return value

    @field_validator("top_p", "top_k")
    @classmethod
    def _must_be_off(cls, value: float, info: ValidationInfo) -> float:
        if value != (off := {"top_p": 1.0, "top_k": 0}[info.field_name or ""]):
            raise ValueError(
                f"{value} cannot be used for training: the engine would renormalize its log-probs over a token set "
                f"that the learner cannot reconstruct, and every ratio would be wrong. Set it to {off}"
            )
        return value


class SnapshotStoreConfig(Service):
    """The store of versions."""

    url: str = ""
    """URL at which the other services reach the store. Default: http://host:port."""
    storage: Literal["folder", "s3"] = "folder"
    """`folder`: a folder on this machine. `s3`: MinIO or another S3 at `endpoint`."""
    folder: FilePath | None = None
    """Folder of the versions. Default: `snapshots` in the run's folder."""
    endpoint: str = ""
    """URL of the S3, for example http://localhost:9000. Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
    or MINIO_ACCESS_KEY and MINIO_SECRET_KEY, or the AWS and MinIO credential files."""
    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "palimpsest"
    """Bucket of the versions."""
    create_bucket: bool = False
    """Create the bucket if it does not exist."""
    prefix: str = ""
    """Prefix of the object names. Default: `ID/`, where ID is `run.id`."""
    region: str = "us-east-1"
    """Region of the bucket."""
    path_style: bool = True
    """`true`: the bucket is part of the path (MinIO and most other S3). `false`: part of the host name (Amazon)."""
    ca_file: FilePath | None = None
    """CA certificates (PEM) that verify the S3. Default: the CA certificates of the system."""
    presign: bool = True
    """`true`: readers get a presigned URL and read from the S3 directly. `false`: readers read through the store."""
    presigned_s: Annotated[int, Field(ge=10, le=604800)] = 3600
    """Lifetime of a presigned URL, in seconds."""
    claims_keep_hours: PositiveFloat = 192.0
    """Retention of the bodies of long log records, in hours. Must be greater than bus.retention_hours."""
    compression: Annotated[int, Field(ge=1, le=19)] = 3
    """zstd level for weights that are stored in full; differences between versions need no level."""
    sweep_s: PositiveFloat = 2.0
    """Interval between two sweeps for versions that no lease retains, in seconds."""
    max_gib: PositiveFloat | None = None
    """Maximum size of the weights in the store, in GiB. At the maximum the store removes what no lease and no pin
    holds; if that is not enough, the learner waits for room. Default: no maximum."""

    @model_validator(mode="after")
    def _s3_is_named(self) -> "SnapshotStoreConfig":
        if self.storage == "s3" and not self.endpoint:
            raise ValueError(
                "snapshot_store.storage is s3, so snapshot_store.endpoint must be its URL, for example "
                "http://localhost:9000"
            )
        return self


class RolloutConfig(Service):
    """Rollout workers."""

    engine: Annotated[VllmEngineConfig | ScriptedEngineConfig, Field(discriminator="kind")] = VllmEngineConfig()
    """`vllm` or `scripted`."""
    worker: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] = "worker-0"
    """Name of this worker. It must be unique and must not change when the worker restarts."""
    max_live: Positive = 256
    """Maximum number of concurrent trajectories."""
    environments: Literal["in_process", "gateway"] | None = None
    """Where the built-in environments (`lookup`, `hop`, `add` and the worlds) take their steps. `in_process`: in the
    worker's process, without a request. `gateway`: in the environment gateway, as all other environments always do.
    None: `in_process` if bus.kind is "sqlite", because all services then share one machine, else `gateway`."""
    agents: Agents = {}
    """Programs that drive the model themselves: name -> `{ command, ... }`. tasks.environments names them like
    environments (docs/agents.md)."""
    attempts: Positive = 3
    """Attempts at a trajectory before the worker drops it as environment_failed or engine_failed."""
    canary_tolerance: PositiveFloat | None = None
    """Maximum canary error, the mean |engine - learner| over the canary tokens, in nats. The worker samples with a
    version only if its error is within this tolerance. None: a multiple of the learner's own rounding noise, which
    the learner measures for each version."""


class ReplicaConfig(Service):
    """Replicas: processes that score for the learner (learner.proximal.kind = "replica")."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] = "replica-0"
    """Name of this replica. It must be unique and must not change when the replica restarts."""
    batch_tokens: Positive = 16384
    """Maximum number of tokens in one forward pass, padding included."""
    threads: Positive = 1
    """CPU threads of the forward pass."""


class LogsConfig(Section):
    """Logs that the services write to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is written."""
    format: Literal["text", "json"] = "text"
    """`text`: for people. `json`: one object per line, for log collectors."""


class RunConfig(Section):
    """The configuration of a run."""

    run: Run = Run()
    model: Model
    tasks: Tasks
    sampling: SamplingConfig = SamplingConfig()
    bus: BusConfig = BusConfig()
    snapshot_store: SnapshotStoreConfig = SnapshotStoreConfig()
    env_gateway: EnvGatewayConfig = EnvGatewayConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    replica: ReplicaConfig = ReplicaConfig()
    local: LocalConfig = LocalConfig()
    logs: LogsConfig = LogsConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _tokens_fit(self) -> "RunConfig":
        longest = self.sampling.max_trajectory_tokens
        if longest is not None and self.sampling.max_turn_tokens >= longest:
            raise ValueError(
                f"sampling.max_turn_tokens ({self.sampling.max_turn_tokens}) leaves no room for a prompt in "
                f"sampling.max_trajectory_tokens ({longest})"
            )
        if self.learner.context_parallel > 1 and self.model.attention != "sdpa":
            raise ValueError(
                f'learner.context_parallel = {self.learner.context_parallel} needs model.attention = "sdpa", not '
                f'"{self.model.attention}"'
            )
        if self.learner.minibatches > self.learner.groups_per_batch:
            raise ValueError(
                f"learner.minibatches ({self.learner.minibatches}) is more than "
                f"learner.groups_per_batch ({self.learner.groups_per_batch}): some minibatches would be empty"
            )
        if self.snapshot_store.claims_keep_hours <= self.bus.retention_hours:
            raise ValueError(
                f"snapshot_store.claims_keep_hours ({self.snapshot_store.claims_keep_hours}) must be more than "
                f"bus.retention_hours ({self.bus.retention_hours}): otherwise a record can outlast its body"
            )
        return self

    @model_validator(mode="after")
    def _engines_can_sleep(self) -> "RunConfig":
        if self.rollout.engine.sleep and (reason := refusal_of_sleep(self.learner)):
            raise ValueError(f"rollout.engine.sleep is true, but {reason}, or remove rollout.engine.sleep")
        return self

    @model_validator(mode="after")
    def _sessions_fit(self) -> "RunConfig":
        self.env_gateway.check_sessions(max_turns=self.sampling.max_turns, time_limit_s=self.tasks.time_limit_s)
        self.evaluation.check_agents(tuple(self.tasks.environments), self.rollout.agents)
        return self

    @property
    def replica_count(self) -> int:
        """Number of replica processes of `palimpsest run`; 0 unless the proximal kind has replicas."""
        return max(1, self.local.replicas) if PROXIMAL_KINDS[self.learner.proximal.kind].runs_replicas else 0

    @property
    def session_lease_s(self) -> float:
        """Lease of a session, in seconds."""
        return self.env_gateway.lease_s or min(SESSION_LEASE_S, self.tasks.time_limit_s)

    @property
    def evaluated_environments(self) -> tuple[str, ...]:
        """Names of the environments that the run evaluates on."""
        return self.evaluation.names(tuple(self.tasks.environments)) if self.evaluation.every else ()

    @property
    def environments_place(self) -> Literal["in_process", "gateway"]:
        """Where the built-in environments take their steps."""
        return self.rollout.environments or ("in_process" if self.bus.kind == "sqlite" else "gateway")

    @property
    def store_url(self) -> str:
        """URL of the snapshot store."""
        return self.snapshot_store.url or f"http://{self.snapshot_store.host}:{self.snapshot_store.port}"

    @property
    def gateway_url(self) -> str:
        """URL of the environment gateway."""
        return self.env_gateway.url or f"http://{self.env_gateway.host}:{self.env_gateway.port}"

    @property
    def topic_prefix(self) -> str:
        """Prefix of the topic names of this run."""
        return self.bus.topic_prefix or f"palimpsest.{self.run.id}."

    @property
    def object_prefix(self) -> str:
        """Prefix of the object names of this run."""
        return self.snapshot_store.prefix or f"{self.run.id}/"

    @property
    def bus_path(self) -> Path:
        """SQLite file of the log."""
        return self.bus.path or self.run.home / run_folder.BUS

    @property
    def snapshot_folder(self) -> Path:
        """Folder in which the store keeps versions."""
        return self.snapshot_store.folder or self.run.home / run_folder.SNAPSHOTS

    @property
    def checkpoint_folder(self) -> Path:
        """Folder in which the learner keeps checkpoints."""
        return self.learner.checkpoint.folder or self.run.home / run_folder.CHECKPOINTS
