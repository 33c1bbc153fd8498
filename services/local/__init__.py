"""Everything on one machine: a run's folder and its processes, supervised."""
