"""The learner: plans tasks inside the staleness budget, trains with exact old log-probs, publishes versions."""
