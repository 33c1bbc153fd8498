"""The configuration keys that define a run. `--resume` refuses a changed value of one of them.

Every key of the schema is in exactly one of the two tables; a test compares them with the schema. An entry is a key, or
a section with all its keys.
"""

from typing import Any

from palimpsest.common.config.differences import differences_at
from palimpsest.common.config.schema import RunConfig

IDENTITY = (
    "run.seed",
    "model.path",
    "model.chat_template",
    "model.chat_template_options",
    "tasks.environments",
    "tasks.samples_per_group",
    "tasks.seeds",
    "evaluation.environments",
    "evaluation.split",
    "evaluation.tasks",
    "evaluation.samples",
    "evaluation.temperature",
    "sampling",
    "bus.kind",
    "bus.path",
    "bus.topic_prefix",
    "bus.task_partitions",
    "bus.trajectory_partitions",
    "learner.groups_per_batch",
    "learner.minibatches",
    "learner.max_staleness",
    "learner.even_groups",
    "learner.recipe",
    "learner.proximal.kind",
    "learner.proximal.behavior_share",
    "learner.proximal.decay",
    "learner.proximal.window",
    "learner.proximal.reset",
    "learner.proximal.threshold",
    "learner.proximal.patience",
    "learner.proximal.cooldown",
    "learner.proximal.trigger",
    # formulas
    "learner.discrepancy",
    "learner.loss",
    "learner.advantages",
    "learner.vcpo",
    "learner.optimizer",
    "learner.lora",
    "learner.routing_replay",
)
"""Model, data, formulas, and the place of the log."""
CHANGEABLE = (
    "evaluation.every",
    "evaluation.time_limit_s",
    # names and places
    "run.id",
    "run.folder",
    "run.export",
    "rollout.worker",
    "replica.name",
    "snapshot_store.host",
    "snapshot_store.port",
    "snapshot_store.url",
    "env_gateway.host",
    "env_gateway.port",
    "env_gateway.url",
    "rollout.agents",
    "rollout.host",
    "rollout.port",
    "learner.host",
    "learner.port",
    "replica.host",
    "replica.port",
    # connection and retention of the log; the broker refuses values that its topics do not allow
    "bus.servers",
    "bus.security",
    "bus.sasl_mechanism",
    "bus.ca_file",
    "bus.certificate_file",
    "bus.key_file",
    "bus.outage_limit_s",
    "bus.replicas",
    "bus.min_insync_replicas",
    "bus.retention_hours",
    "bus.max_record_bytes",
    "bus.claim_bytes",
    # connection and place of the store; the learner refuses a store without its checkpoint
    "snapshot_store.storage",
    "snapshot_store.folder",
    "snapshot_store.endpoint",
    "snapshot_store.bucket",
    "snapshot_store.create_bucket",
    "snapshot_store.prefix",
    "snapshot_store.region",
    "snapshot_store.path_style",
    "snapshot_store.ca_file",
    "snapshot_store.presign",
    "snapshot_store.presigned_s",
    "snapshot_store.claims_keep_hours",
    "snapshot_store.compression",
    "snapshot_store.sweep_s",
    "snapshot_store.max_gib",
    "learner.checkpoint",
    # limits
    "tasks.time_limit_s",
    "env_gateway.lease_s",
    "env_gateway.step_limit_s",
    "env_gateway.max_sessions",
    "env_gateway.remember_s",
    "env_gateway.request_limit_bytes",
    "env_gateway.result_limit_bytes",
    "env_gateway.max_processes",
    "env_gateway.session_turns",
    "env_gateway.session_calls",
    "env_gateway.session_output_bytes",
    "env_gateway.child_memory_mib",
    "env_gateway.child_processes",
    "env_gateway.child_files",
    "env_gateway.child_file_mib",
    "env_gateway.child_user",
    "env_gateway.child_network",
    "env_gateway.child_hosts",
    "env_gateway.isolation",
    "env_gateway.code_tools",
    "env_gateway.code_python",
    "rollout.max_live",
    "rollout.attempts",
    "rollout.canary_tolerance",
    "learner.versions",
    "learner.admission",
    "learner.max_overtaking",
    "learner.proximal.hold_s",
    "learner.proximal.wait_s",
    "learner.proximal.deadline_s",
    "learner.proximal.missing",
    # computation and reporting
    "env_gateway.adapters",
    "env_gateway.plugins",
    "env_gateway.plugin_variables",
    "rollout.engine",
    "rollout.environments",
    "model.attention",
    "learner.micro_batch_tokens",
    "learner.logprob_chunk_tokens",
    "learner.layout",
    "learner.offload",
    "learner.activation_checkpointing",
    "learner.activation_checkpointing_every",
    "learner.sharding",
    "learner.context_parallel",
    "learner.publishing",
    "learner.proximal.prefetch",
    "learner.canary_trajectories",
    "learner.threads",
    "learner.record",
    "learner.audit",
    "replica.batch_tokens",
    "replica.threads",
    "local",
    "logs",
    "tracking",
)
"""Keys that may change when a run is resumed."""


def differences(before: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, value before, value now) of every key of IDENTITY that differs."""
    old, new = before.model_dump(), now.model_dump()
    return [
        found for entry in IDENTITY for found in differences_at(entry, _value_at(old, entry), _value_at(new, entry))
    ]


def _value_at(values: Any, key: str) -> Any:
    """Return the value of a key; None if the section's kind does not have the key."""
    for part in key.split("."):
        values = values.get(part)
    return values
