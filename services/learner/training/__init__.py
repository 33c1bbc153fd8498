"""Trains one version: preparation, passes, optimizer steps, results."""
