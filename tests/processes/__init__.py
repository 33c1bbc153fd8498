"""Programs that tests run, and how tests wait for processes."""
