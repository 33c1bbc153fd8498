"""The dashboard Pipeline: does the run make progress, and who waits for whom."""

from tools.dashboards.panels import RATE, RUN, Dashboard, Panel, gauge, mean, quantile, rate, spent

PROGRESS = (
    Panel("Versions", "none", {
        "learner": gauge("learner_version"), "{{instance}}": gauge("rollout_version", "instance"),
        "{{instance}} (replica)": gauge("replica_version", "instance"),
    }, "A worker far below the learner samples tokens that become too old."),
    Panel("Age of the newest version", "s", {"age": gauge("learner_last_version_seconds")},
          "A sawtooth. A line that only rises: the run makes no progress."),
    Panel("Tokens per second", "none", {
        "sampled": rate("rollout_sampled_tokens"), "trained": rate("learner_trained_tokens"),
    }, "Sampled and not trained: dropped, too old, or still waiting."),
    Panel("Learner's time by phase", "percentunit", {"{{phase}}": spent("learner_phase_seconds", "phase")},
          "Much wait: add workers. No wait: the workers are faster than the learner."),
    Panel("Reward", "none", {
        "mean": gauge("learner_reward"), "solved": gauge("learner_success"),
        "{{environment}}": gauge("learner_environment_reward", "environment"),
    }, "Of the last batch."),
    Panel("Held-out tasks", "none", {
        "avg@k {{environment}}": gauge("evaluation_success", "environment"),
        "pass@k {{environment}}": gauge("evaluation_passed", "environment"),
    }, "Of the version evaluated last. Falls while the reward rises: the policy fits the training tasks."),
    Panel("Evaluations", "none", {
        "version evaluated last": gauge("evaluation_version"), "best version": gauge("evaluation_best_version"),
        "seconds of the last": gauge("evaluation_seconds"), "{{end}} per second": rate("evaluation_samples", "end"),
    }, "Workers load no later version during an evaluation."),
    Panel("Reward of all sessions", "none", {"{{environment}}": mean("gateway_reward", "environment")},
          "Also of sessions that were dropped."),
    Panel("Changes by people", "none", {
        "settings, generation": gauge("learner_settings_generation"),
        "{{what}} paused": gauge("learner_paused", "what"),
        "{{kind}} per second": rate("learner_changes", "kind"),
        "not tracked per second, {{reason}}": rate("learner_tracking_dropped", "reason"),
    }, "`palimpsest changes` lists who changed what."),
)  # fmt: skip
TRAJECTORIES = (
    Panel("Trajectories", "none", {
        "pending": gauge("learner_pending_trajectories"), "waiting": gauge("learner_waiting_trajectories"),
        "live": gauge("rollout_live_trajectories", how="sum"),
    }, "Pending: offered and not resolved. Waiting: arrived and not trained on. Live: in the workers."),
    Panel("Trajectories per second", "none", {
        "offered": rate("learner_offered_trajectories"), "trained": rate("learner_trained_trajectories"),
        "duplicates": rate("learner_duplicates"), "{{reason}}": rate("learner_dropped_trajectories", "reason"),
        "failed branches": rate("learner_failed_branches"),
    }, "Drops by reason. Failed branches: sequences of agents' sessions left out because a pass fails on them."),
    Panel("Ends in the workers", "none", {
        "{{end}}": rate("rollout_trajectories", "end"), "{{code}}": rate("rollout_failed_attempts", "code"),
    }, "Ended trajectories by outcome, and failed attempts by error code."),
    Panel("Messages of agent programs per second", "none", {"{{place}}": rate("rollout_agent_messages", "place")},
          "Branched: a program rewrote its past. Refused: a request that is not served."),
    Panel("Groups per second", "none", {
        "{{environment}}": rate("learner_trained_groups", "environment"),
        "{{environment}}, equal rewards, {{fate}}": rate("learner_even_groups", "environment, fate"),
    }, "Groups of equal rewards have no gradient."),
    Panel("Oldest", "s", {
        "live trajectory": gauge("learner_oldest_live_seconds"), "open group": gauge("learner_oldest_group_seconds"),
    }, "A slow tool or a session that hangs."),
    Panel("Admitted groups", "none", {"groups": gauge("learner_admitted_groups")},
          "Falls while adaptive admission lets fewer groups start."),
    Panel("Length, median and 95th percentile", "none", {
        "{{fate}}, median": quantile(0.5, "learner_resolved_trajectory_tokens", "fate"),
        "{{fate}}, 95 %": quantile(0.95, "learner_resolved_trajectory_tokens", "fate"),
    }, "Sampled tokens of trained and of dropped trajectories. Drops that are longer bias the batch."),
    Panel("Truncated", "percentunit", {"share": gauge("learner_truncated_share")},
          "Trajectories that reached a limit on turns or tokens."),
    Panel("Dead letters", "none", {
        "learner, {{cause}}": rate("learner_dead_letters", "cause"),
        "worker, {{cause}}": rate("rollout_dead_letters", "cause"),
    }, "Rejected records per second. List them with `palimpsest dead-letters list`."),
)  # fmt: skip
GATEWAY = (
    Panel("Sessions", "none", {
        "{{environment}}": gauge("gateway_live_sessions", "environment", how="sum"),
    }, "Live now."),
    Panel("Sessions per second", "none", {
        "{{environment}} started": rate("gateway_sessions_created", "environment"),
        "{{environment}} {{status}}": rate("gateway_sessions_ended", "environment, status"),
        "{{environment}} limit: {{limit}}": rate("gateway_sessions_limited", "environment, limit"),
    }, "Started, ended by status, and ended at a limit."),
    Panel("Steps per second", "none", {
        "{{environment}}": rate("gateway_steps", "environment"),
        "repeated {{request}}": rate("gateway_replays", "request"),
    }, "Repeated requests are answered with the stored reply."),
    Panel("Time of a step and of a start, 95th percentile", "s", {
        "{{environment}} step": quantile(0.95, "gateway_step_seconds", "environment"),
        "{{environment}} start": quantile(0.95, "gateway_reset_seconds", "environment"),
    }, "The environment's own time."),
    Panel("Failures per second", "none", {
        "{{environment}} {{code}}": rate("gateway_environment_failures", "environment, code"),
        "{{environment}} tool: {{cause}}": rate("gateway_tool_errors", "environment, cause"),
        "{{environment}} refused host": rate("gateway_hosts_refused", "environment"),
    }, "A failed session is repeated; a failed tool call or a refused host is part of the trajectory."),
    Panel("Refused requests per second", "none", {"{{code}}": rate("gateway_refused", "code")}, "By error code."),
)  # fmt: skip
SERVICES = (
    Panel("Unread records", "none", {"{{topic}}": gauge("log_lag_records", "topic", how="sum")},
          "Tasks wait for free workers. The other topics must stay near 0."),
    Panel("Outages", "none", {"{{instance}} to {{of}}": gauge("outage", "instance, of")}, "1 while it lasts."),
    Panel("Heartbeats", "s", {"{{instance}} {{loop}}": gauge("heartbeat_seconds", "instance, loop")},
          "Age of the last turn. The learner's rises while it trains."),
    Panel("Store", "none", {
        "versions": gauge("store_versions"), "oldest needed": gauge("store_oldest_needed_version"),
        "versions removed": rate("store_swept_versions"), "bodies removed": rate("store_swept_claims"),
        "chains replaced": rate("store_rebased_versions"),
    }, "The number of versions stays bounded while leases move."),
    Panel("Bytes", "bytes", {
        "weights": gauge("store_bytes"), "used of the limit": gauge("store_used_bytes"),
        "limit": gauge("store_quota_bytes"),
        "free: {{instance}} {{folder}}": gauge("free_bytes", "instance, folder", how="min"),
    }, "Bytes of weights in the store, its limit (0: none); bytes free on each disk."),
    Panel("Traffic of the store", "Bps", {
        "received": rate("store_received_bytes"),
        "sent": rate("store_sent_bytes"),
        "long records": rate("store_claim_bytes"),
    }, "Reads that S3 serves directly are not in it."),
    Panel("Requests to the store", "none", {
        "storage failed": rate("store_storage_failures"), "redirected to S3": rate("store_redirected_reads"),
        "refused: {{reason}}": rate("store_refused", "reason"),
    }, "Per second."),
    Panel("Memory", "bytes", {"{{instance}}": f"process_resident_memory_bytes{RUN}"}, "Resident, without the GPU's."),
    Panel("Processors", "none", {"{{instance}}": f"rate(process_cpu_seconds_total{RUN}{RATE})"}, "Cores in use."),
    Panel("Open files", "none", {"{{instance}}": f"process_open_fds{RUN}"}, "A line that rises forever is a leak."),
    Panel("Processes", "none", {"{{service}} {{version}}": gauge("build_info", "service, version", how="count")},
          "Processes of each service and release that answer."),
)  # fmt: skip
PIPELINE = Dashboard("pipeline", "pipeline", {
    "Progress": PROGRESS, "Trajectories": TRAJECTORIES, "Environments": GATEWAY, "Log, store and processes": SERVICES,
})  # fmt: skip
