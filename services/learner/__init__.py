"""The learner: offers tasks within the staleness bound, trains with exact old log-probs, publishes versions."""
