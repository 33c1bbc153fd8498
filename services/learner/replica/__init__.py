"""The dedicated old-logit model: processes beside the learner that score trajectories as they arrive."""
