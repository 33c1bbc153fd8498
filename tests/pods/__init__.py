"""Pods of the chart as real containers: Podman starts them, and cluster.py plays the controllers."""
