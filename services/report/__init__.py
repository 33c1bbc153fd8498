"""Reads a run's folder and writes its summary and runs/ID/report.html (docs/report.md)."""
