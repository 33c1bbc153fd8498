"""Sessions with environments: what travels between a rollout worker and the gateway, and the worker's client."""
