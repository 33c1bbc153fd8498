"""Every key of a run's configuration, with its default and what it does.

The text under a key is its documentation: docs/configuration.md is made from it (`make docs`).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from palimpsest.common import run_folder
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.section import FilePath, Positive, PositiveFloat, Section, Service, Share


class Run(Section):
    """What this run is called and where it keeps its files."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$|^$")] = ""
    """Name of the run. Empty: made from the time it starts (`palimpsest run` only; by hand, give one)."""
    folder: FilePath = Path("runs")
    """Each run keeps its log, snapshots, checkpoints and report in `folder/id`."""
    seed: int = 0
    """Fixes tasks, minibatch order and initial random state."""
    export: bool = True
    """A finished run leaves its last version as a Hugging Face model in `folder/id/model` (`palimpsest run` only)."""

    @property
    def home(self) -> Path:
        """The run's own folder."""
        return self.folder / self.id


class Model(Section):
    """The policy."""

    path: str
    """Folder (or hub id) of a Hugging Face causal LM with tokenizer and chat template."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """How the learner computes attention; `eager` is fastest for short sequences on a CPU."""
    chat_template_options: dict[str, str | int | float | bool] = {}
    """Passed to the chat template, for example `enable_thinking = false` for Qwen3."""


class Tasks(Section):
    """What the policy is trained on."""

    environments: dict[str, PositiveFloat]
    """Environment name -> its share of the groups, for example `{ lookup = 1.0 }`."""
    samples_per_group: Annotated[int, Field(ge=2)] = 8
    """Trajectories sampled for each task; they share a baseline."""
    time_limit_s: PositiveFloat = 600.0
    """A group's trajectories that are not back after this many seconds are dropped."""


class SamplingConfig(Section):
    """How tokens are sampled for training."""

    temperature: PositiveFloat = 1.0
    """Both engines report log-probabilities at this temperature."""
    top_p: float = 1.0
    """Must be 1: below it the engine renormalizes on a set of tokens that the learner does not know."""
    top_k: int = 0
    """Must be 0 (off), for the same reason."""
    max_turn_tokens: Positive = 512
    """Longest model message, in tokens, its stop token included. One cut off here ends its trajectory, unacted on."""
    max_trajectory_tokens: Positive = 4096
    """Longest trajectory, prompt and tool output included, in tokens."""
    max_turns: Positive = 16
    """Most model messages in one trajectory."""

    @field_validator("top_p", "top_k")
    @classmethod
    def _whole(cls, value: float, info: ValidationInfo) -> float:
        if value != (whole := {"top_p": 1.0, "top_k": 0}[info.field_name or ""]):
            raise ValueError(
                f"{value} cannot be used for training: the engine would renormalize its log-probs on a set of tokens "
                f"that the learner does not know, so every ratio would be wrong. Set it to {whole}"
            )
        return value


class BusConfig(Section):
    """The log between the services."""

    kind: Literal["sqlite", "kafka"] = "sqlite"
    """`sqlite`: one file, several processes of one machine. `kafka`: an Apache Kafka, named by `servers`."""
    path: FilePath | None = None
    """The SQLite file. Default: `bus.sqlite` in the run's folder."""
    servers: str = ""
    """Kafka brokers to begin with: `host:port`, several with commas between them."""
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,150}$")] = ""
    """What the names of the run's topics begin with. Default: `palimpsest.ID.`, ID being the run's."""
    task_partitions: Positive = 8
    """Partitions of `tasks`: at most so many rollout workers share the work."""
    trajectory_partitions: Positive = 4
    """Partitions of `trajectories`."""
    replicas: Positive = 1
    """Copies of each partition (Kafka); 3 where a broker may be lost."""
    min_insync_replicas: Positive = 1
    """Copies that must have a record before it counts as written (Kafka); 2 of 3 replicas."""
    retention_hours: PositiveFloat = 168.0
    """How long records are kept (Kafka): longer than any pause of the run."""
    max_record_bytes: Annotated[int, Field(ge=65536)] = 1048576
    """Longest record on the log itself (Kafka): the topics' `max.message.bytes`."""
    claim_bytes: Annotated[int, Field(ge=1024)] = 524288
    """A longer body travels through the snapshot store, and the record carries its digest (Kafka)."""
    outage_limit_s: PositiveFloat = 600.0
    """An outage of the log that lasts longer ends the process (Kafka); until then it waits and tries again."""
    security: Literal["plaintext", "tls", "sasl_plaintext", "sasl_tls"] = "plaintext"
    """How brokers are spoken to. User and password: PALIMPSEST_KAFKA_USERNAME, PALIMPSEST_KAFKA_PASSWORD."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """How the user is proven to the broker, with `sasl_plaintext` and `sasl_tls`."""
    ca_file: FilePath | None = None
    """Certificates (PEM) that the brokers' are checked against. Default: the system's."""
    certificate_file: FilePath | None = None
    """Our own certificate (PEM), for brokers that ask for one."""
    key_file: FilePath | None = None
    """Its private key (PEM)."""

    @model_validator(mode="after")
    def _kafka_is_named(self) -> "BusConfig":
        if self.kind == "kafka" and not self.servers:
            raise ValueError("bus.kind is kafka, so bus.servers must name a broker, for example localhost:9092")
        if self.claim_bytes >= self.max_record_bytes:
            raise ValueError(
                f"bus.claim_bytes ({self.claim_bytes}) must be below bus.max_record_bytes ({self.max_record_bytes}): "
                f"a record that is not sent as a claim has to fit into one message, its headers included"
            )
        if self.min_insync_replicas > self.replicas:
            raise ValueError(
                f"bus.min_insync_replicas ({self.min_insync_replicas}) is more than bus.replicas ({self.replicas}): "
                f"nothing could ever be written"
            )
        return self


class SnapshotStoreConfig(Service):
    """The store of versions."""

    url: str = ""
    """Where the others reach it. Default: http://host:port."""
    storage: Literal["folder", "s3"] = "folder"
    """`folder`: on this machine's disk. `s3`: MinIO or any S3, named by `endpoint`."""
    folder: FilePath | None = None
    """Where versions are kept. Default: `snapshots` in the run's folder."""
    endpoint: str = ""
    """The S3's address, for example http://localhost:9000. Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
    or MINIO_ACCESS_KEY and MINIO_SECRET_KEY, or the usual credential files."""
    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "palimpsest"
    """Bucket that versions are kept in."""
    create_bucket: bool = False
    """Make the bucket if it is missing."""
    prefix: str = ""
    """What the objects' names begin with. Default: `ID/`, ID being the run's."""
    region: str = "us-east-1"
    """The bucket's region."""
    path_style: bool = True
    """Bucket in the path (MinIO, most S3 besides Amazon's); false: in the host name."""
    ca_file: FilePath | None = None
    """Certificates (PEM) that the S3's is checked against. Default: the system's."""
    presign: bool = True
    """Readers get a presigned address and read from the S3 themselves; false: through the store."""
    presigned_s: Annotated[int, Field(ge=10, le=604800)] = 3600
    """How long such an address holds."""
    claims_keep_hours: PositiveFloat = 192.0
    """Bodies of long log records are removed after this time: longer than bus.retention_hours."""
    compression: Annotated[int, Field(ge=1, le=19)] = 3
    """zstd level for stored weights."""
    sweep_s: PositiveFloat = 2.0
    """Seconds between two looks for versions that no lease holds any more."""

    @model_validator(mode="after")
    def _s3_is_named(self) -> "SnapshotStoreConfig":
        if self.storage == "s3" and not self.endpoint:
            raise ValueError("snapshot_store.storage is s3, so snapshot_store.endpoint must name it")
        return self


class EnvGatewayConfig(Service):
    """The gateway to the environments."""

    url: str = ""
    """Where rollout workers reach it. Default: http://host:port."""
    lease_s: PositiveFloat = 600.0
    """A session not heard of for so long is expired."""
    step_limit_s: PositiveFloat = 60.0
    """A step that takes longer ends its session as an error."""
    max_sessions: Positive = 4096
    """More are refused with 429."""
    remember_s: PositiveFloat = 600.0
    """An ended session is remembered for so long: a late retry gets the stored answer."""
    request_limit_bytes: Positive = 1048576
    """Longer requests are refused with 413."""
    result_limit_bytes: Positive = 65536
    """Longer tool results are cut, with a note in the text."""
    plugins: dict[str, str] = {}
    """Your own environments: name -> `package.module:Class`. Each session of one runs in a process of its own."""
    max_processes: Positive = 64
    """Sessions with a process of their own at once; more wait."""


class VllmEngineConfig(Section):
    """vLLM in the worker's own process."""

    kind: Literal["vllm"] = "vllm"
    max_concurrent_tokens: Positive = 8192
    """Most tokens in one engine step."""
    kv_cache_gib: PositiveFloat = 1.0
    """Memory for keys and values (CPU engine)."""
    gpu_memory_utilization: Share = 0.85
    """Share of the GPU's memory vLLM may take (GPU engine)."""
    tensor_parallel: Positive = 1
    """GPUs that share one model (GPU engine)."""
    compile: bool = False
    """Compile the model's graph; slower to start, faster to run for large models."""
    threads: Positive = 1
    """CPU threads of the engine's forward pass (CPU engine)."""
    amx: bool = True
    """Use the CPU's matrix tiles (AMX) where it has them and the kernel permits it (CPU engine)."""


class ScriptedEngineConfig(Section):
    """No model: answers come from a list of texts. For tests of everything around the engine."""

    kind: Literal["scripted"]
    texts: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """One is chosen for each model message by the trajectory's id and turn."""
    tokens_per_s: PositiveFloat = 2000.0
    """How fast each request gets its tokens."""


class RolloutConfig(Service):
    """Rollout workers."""

    engine: Annotated[VllmEngineConfig | ScriptedEngineConfig, Field(discriminator="kind")] = VllmEngineConfig()
    """`vllm` or `scripted`."""
    worker: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] = "worker-0"
    """Name of this worker, stable over its restarts."""
    max_live: Positive = 256
    """Trajectories in flight at once."""
    attempts: Positive = 3
    """Tries at a trajectory before it is dropped as environment_failed or engine_failed."""
    canary_tolerance: PositiveFloat = 0.03
    """Largest mean |engine - learner| over the canaries' tokens, in nats, at which a version is served."""


class ReplicaConfig(Service):
    """Processes that score for the learner (learner.proximal.kind = "replica")."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] = "replica-0"
    """Name of this replica, stable over its restarts and no other's."""
    batch_tokens: Positive = 16384
    """Most tokens (padding included) in one forward pass."""
    threads: Positive = 1
    """CPU threads of the forward pass."""


class LocalConfig(Section):
    """Everything on one machine (`palimpsest run`)."""

    rollout_workers: Positive = 1
    """Rollout worker processes."""
    learner_ranks: Positive = 1
    """Learner processes; several are launched by torchrun."""
    replicas: Annotated[int, Field(ge=0)] = 0
    """Replica processes, if learner.proximal.kind is "replica"; at least one is started then."""
    restarts: Annotated[int, Field(ge=0)] = 5
    """How often a process that crashes again and again, without having worked in between, is started again before the
    run gives up. It gives up at once when the same crash comes three times in a row."""


class LogsConfig(Section):
    """What the services write to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level written."""
    format: Literal["text", "json"] = "text"
    """`json`: one object a line, for collectors."""


class RunConfig(Section):
    """A whole run."""

    run: Run = Run()
    model: Model
    tasks: Tasks
    sampling: SamplingConfig = SamplingConfig()
    bus: BusConfig = BusConfig()
    snapshot_store: SnapshotStoreConfig = SnapshotStoreConfig()
    env_gateway: EnvGatewayConfig = EnvGatewayConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig
    replica: ReplicaConfig = ReplicaConfig()
    local: LocalConfig = LocalConfig()
    logs: LogsConfig = LogsConfig()

    @model_validator(mode="after")
    def _tokens_fit(self) -> "RunConfig":
        if self.sampling.max_turn_tokens >= self.sampling.max_trajectory_tokens:
            raise ValueError(
                f"sampling.max_turn_tokens ({self.sampling.max_turn_tokens}) leaves no room for a prompt in "
                f"sampling.max_trajectory_tokens ({self.sampling.max_trajectory_tokens})"
            )
        if self.learner.minibatches > self.learner.groups_per_batch:
            raise ValueError(
                f"learner.minibatches ({self.learner.minibatches}) is more than "
                f"learner.groups_per_batch ({self.learner.groups_per_batch}): some would be empty"
            )
        if self.snapshot_store.claims_keep_hours <= self.bus.retention_hours:
            raise ValueError(
                f"snapshot_store.claims_keep_hours ({self.snapshot_store.claims_keep_hours}) must be more than "
                f"bus.retention_hours ({self.bus.retention_hours}): records would outlive their bodies"
            )
        return self

    @property
    def store_url(self) -> str:
        """Where the snapshot store answers."""
        return self.snapshot_store.url or f"http://{self.snapshot_store.host}:{self.snapshot_store.port}"

    @property
    def gateway_url(self) -> str:
        """Where the environment gateway answers."""
        return self.env_gateway.url or f"http://{self.env_gateway.host}:{self.env_gateway.port}"

    @property
    def topic_prefix(self) -> str:
        """What the names of the run's topics begin with."""
        return self.bus.topic_prefix or f"palimpsest.{self.run.id}."

    @property
    def object_prefix(self) -> str:
        """What the names of the run's objects begin with."""
        return self.snapshot_store.prefix or f"{self.run.id}/"

    @property
    def bus_path(self) -> Path:
        """The SQLite log."""
        return self.bus.path or self.run.home / run_folder.BUS

    @property
    def snapshot_folder(self) -> Path:
        """Where the store keeps versions."""
        return self.snapshot_store.folder or self.run.home / run_folder.SNAPSHOTS

    @property
    def checkpoint_folder(self) -> Path:
        """Where the learner keeps its restartable state."""
        return self.learner.checkpoint.folder or self.run.home / run_folder.CHECKPOINTS
