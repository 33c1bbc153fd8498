"""Rollout workers: sample trajectories on an inference engine and stamp every token with the version behind it."""
