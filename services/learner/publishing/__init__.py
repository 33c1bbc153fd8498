"""A version leaves the learner: store it with its canaries, then announce it."""
