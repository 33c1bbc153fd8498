"""The restartable state of the learner: write, commit, restore, remove."""
