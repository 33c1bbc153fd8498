"""What is said of a version: its line in history.jsonl, statistics, alerts, Prometheus."""
