"""Sessions with environments: requests and replies of the gateway, and the client of the rollout worker."""
