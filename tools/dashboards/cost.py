"""The dashboard Cost: what exactness and asynchrony cost in time, tokens and bytes."""

from tools.dashboards.panels import RATE, RUN, Dashboard, Panel, gauge, mean, rate, spent

TIME = (
    Panel("Share of training by part", "percentunit", {"{{part}}": rate("learner_train_seconds", "part")},
          "proximal: old log-probs. audit: exact log-probs beside a surrogate. cut: stall of the workers."),
    Panel("Time of a version by phase", "s", {"{{phase}}": mean("learner_phase_seconds", "phase")}, "Mean."),
    Panel("Time of a cut by phase", "s", {"{{phase}}": mean("learner_cut_seconds", "phase")},
          "Mean. stall: total time for which the workers are paused."),
    Panel("Loads of old versions per second", "none", {
        "learner": rate("learner_snapshot_loads"), "replicas": rate("replica_loads"),
    }, "Each load replaces the weights of a copy of the model."),
    Panel("Time of a replica", "s", {
        "load": mean("replica_load_seconds"), "forward pass": mean("replica_pass_seconds"),
    }, "Mean."),
)  # fmt: skip
WORKERS = (
    Panel("Idle workers", "percentunit", {"{{instance}}": rate("rollout_idle_seconds", "instance")},
          "Share of the time without a trajectory in flight: the learner is slower, or tasks are missing."),
    Panel("Pauses of an engine", "s", {
        "update": mean("rollout_update_pause_seconds"), "cut: until it pauses": mean("rollout_cut_pause_seconds"),
        "cut: hold": mean("rollout_hold_seconds"),
    }, "Mean seconds of each."),
    Panel("Share of the time paused", "percentunit", {
        "{{instance}} updates": spent("rollout_update_pause_seconds", "instance"),
        "{{instance}} cuts": spent("rollout_hold_seconds", "instance"),
    }, "Generation is paused."),
    Panel("Download of a version", "s", {"mean": mean("rollout_fetch_seconds")}, "It runs beside the generation."),
    Panel("Calls to the gateway", "s", {"mean": mean("rollout_environment_seconds")}, "With the network."),
)  # fmt: skip
WASTE = (
    Panel("Trained share of sampled tokens", "percentunit", {
        "share": f"{rate('learner_trained_tokens')} / {rate('rollout_sampled_tokens')}",
    }, "The rest was dropped, too old, or not needed at the end."),
    Panel("Cores for each service", "none", {
        "{{service}}": f"sum by (service) (rate(process_cpu_seconds_total{RUN}{RATE})"
        f" * on (instance) group_left (service) palimpsest_build_info{RUN})",
    }, "Processor time, without GPUs."),
    Panel("Bytes sent for each version", "bytes", {
        "bytes": f"{rate('store_sent_bytes')} / sum by (run) (deriv(palimpsest_learner_version{RUN}{RATE}))",
        "applied by a worker": f"{rate('rollout_fetched_bytes')} / {rate('rollout_updates')}",
    }, "Bases and deltas that workers download; the workers of a machine share a download."),
    Panel("Bytes in the store", "bytes", {"weights": gauge("store_bytes")}, "Bounded by the leases."),
)  # fmt: skip
COST = Dashboard("cost", "cost", {"Learner": TIME, "Workers": WORKERS, "Tokens, processors and bytes": WASTE})
