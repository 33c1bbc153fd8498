"""Training one version: preparation, passes, optimizer steps, results."""
