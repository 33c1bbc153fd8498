"""Programs that make runs. No service imports them."""
