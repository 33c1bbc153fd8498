"""Rollout workers: sample trajectories on an inference engine and record the version that sampled each token."""
