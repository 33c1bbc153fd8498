"""Reports about a version: its line in history.jsonl, statistics, alerts, Prometheus series."""
