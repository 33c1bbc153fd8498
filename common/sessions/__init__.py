"""Sessions with environments: their lifecycle, the gateway's requests and replies, and the worker's ways to them."""
