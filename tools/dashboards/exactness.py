"""The dashboard Exactness: are old log-probs exact, what do masks and clips remove, and is the optimization sound."""

from tools.dashboards.panels import Dashboard, Panel, gauge, mean, rate

ALERTS = (
    Panel("Rules", "none", {"{{rule}}": gauge("learner_alert", "rule")}, "1 while the alert is on."),
    Panel("Proximal", "percentunit", {
        "exact": gauge("learner_proximal_exact"), "tokens with old log-probs": gauge("learner_old_coverage"),
    }, "1: the proximal is the old policy."),
    Panel("Tokens that lacked a value, per second", "none", {
        "{{cause}}": rate("learner_fallbacks", "cause"), "not finite": rate("learner_nonfinite_tokens"),
        "score NaN": rate("learner_old_unscorable_tokens"), "flushed too late": rate("learner_late_tokens"),
    }, "0 in normal operation."),
    Panel("Canary error", "none", {"{{instance}}": gauge("rollout_canary_error_nats", "instance")},
          "Mean |engine - learner|, nats. It must not grow with the versions."),
    Panel("Updates of the engines", "none", {"{{outcome}}": rate("rollout_updates", "outcome")}, "Per second."),
    Panel("Discrepancy by worker", "none", {"{{worker}}": gauge("learner_worker_log_discrepancy_abs", "worker")},
          "Nats. One worker above the others has another engine or other weights."),
)  # fmt: skip
RATIOS = (
    Panel("Discrepancy by staleness", "none", {"{{staleness}}": gauge("learner_log_discrepancy_abs", "staleness")},
          "Mean |log proximal / behavior|, nats. With exact log-probs it does not depend on staleness."),
    Panel("Staleness ratio by staleness", "none", {
        "{{staleness}}": gauge("learner_log_staleness_ratio_abs", "staleness"),
    },
          "Mean |log current / proximal|, nats. It rises with staleness."),
    Panel("Log-ratios per second", "none", {
        "{{ratio}} from {{above}}": rate("learner_log_ratio_tokens", "ratio, above"),
    },
          "Tokens in each bin of each log-ratio."),
    Panel("Staleness", "none", {
        "mean": mean("learner_staleness_versions"), "span of a group": gauge("learner_group_span_versions"),
    }, "Versions, of trained tokens."),
    Panel("Length by staleness", "none", {"{{staleness}}": gauge("learner_trajectory_tokens", "staleness")},
          "Longer trajectories are staler."),
    Panel("Tokens too old", "none", {
        "masked": rate("learner_too_old_tokens"),
        "{{by}} from {{above}}: {{fate}}": rate("learner_token_fates", "by, above, fate"),
    }, "Tokens trained, and lost to learner.max_staleness, by length and duration of their trajectory."),
    Panel("Surrogate error", "none", {
        "leak, staleness {{staleness}}": gauge("learner_leak_rms", "staleness"),
        "{{judged}}": gauge("learner_wrong_reason_share", "judged"),
    }, "Only with a surrogate and audits."),
)  # fmt: skip
REMOVAL = (
    Panel("Active tokens", "percentunit", {
        "active": gauge("learner_active_share"), "advantage removed": gauge("learner_removed_advantage_share"),
    }, "Neither masked nor clipped. Below a half, the rule mostly_removed is on."),
    Panel("Removed tokens by cause", "none", {
        "{{cause}}, exclusive {{exclusive}}": rate("learner_removed_tokens", "cause, exclusive"),
    },
          "Per second. Exclusive: no other cause removes these tokens."),
    Panel("Masked by staleness", "percentunit", {"{{staleness}}": gauge("learner_masked_share", "staleness")},
          "A mask of the discrepancy does not depend on staleness."),
    Panel("Clipped by staleness", "percentunit", {"{{staleness}}": gauge("learner_clipped_share", "staleness")},
          "A clip rises with staleness."),
    Panel("Slope of the removal", "none", {"{{removal}}": gauge("learner_removal_slope", "removal")},
          "Change of the share with each version of staleness."),
    Panel("Effective samples", "percentunit", {
        "{{of}}, {{weights}}": gauge("learner_effective_share", "of, weights"),
    }, "ESS / N."),
    Panel("Weights", "none", {
        "normalizer": gauge("learner_weight_normalizer"), "factor on the learning rate": gauge("learner_lr_factor"),
        "capped per second, {{bound}}": rate("learner_capped_tokens", "bound"),
    }, "Mean weight of a token, and weights at a bound."),
)  # fmt: skip
OPTIMIZATION = (
    Panel("Entropy", "none", {"nats": gauge("learner_entropy")}, "A fall to a tenth is a collapse."),
    Panel("Gradient norm", "none", {"norm": gauge("learner_grad_norm")}, "Before clipping."),
    Panel("Learning rate", "none", {"learning rate": gauge("learner_learning_rate")}, "Of the newest step."),
    Panel("Steps not taken, per second", "none", {
        "gradient not finite": rate("learner_skipped_steps"), "no usable token": rate("learner_empty_minibatches"),
    }, "0 in normal operation."),
    Panel("Measures of the batch", "none", {
        "{{what}}": gauge("learner_batch", "what"),
    }, "Perplexities, chi2, advantages."),
    Panel("State of the proximal and the loss", "none", {
        "{{what}}": gauge("learner_companion", "what"),
    }, "As configured."),
)  # fmt: skip
CUTS = (
    Panel("Cuts per second", "none", {
        "cuts": rate("learner_cuts"),
        "late workers": rate("learner_cut_late_workers"),
        "late answers": rate("learner_cut_late_answers"),
        "holds timed out": rate("rollout_holds_given_up"),
    }, "Only with the proximal interruption."),
    Panel("Flushes per second", "none", {
        "{{outcome}}": rate("learner_flushes", "outcome"), "by workers": rate("rollout_flushed"),
    }, "Live trajectories flushed at cuts."),
    Panel("Tokens scored per second", "none", {
        "{{when}}": rate("learner_old_scored_tokens", "when"), "found on the log": rate("learner_old_found_tokens"),
        "replica": rate("replica_scored_tokens"), "records of replicas": rate("replica_published_scores"),
    }, "By the learner while the version is resident, and by replicas."),
    Panel("Replicas", "none", {
        "{{instance}} waiting": gauge("replica_waiting_trajectories", "instance"),
        "not scored: {{reason}}": rate("replica_skipped", "reason"),
    }, "Waiting trajectories that grow: add replicas."),
)  # fmt: skip
EXACTNESS = Dashboard("exactness", "exactness", {
    "Alerts and engines": ALERTS, "Discrepancy and staleness": RATIOS, "Masks, clips and weights": REMOVAL,
    "Optimization": OPTIMIZATION, "Cuts and replicas": CUTS,
})  # fmt: skip
