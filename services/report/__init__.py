"""What a run leaves: its folder read back, the summary, and runs/ID/report.html (docs/report.md)."""
