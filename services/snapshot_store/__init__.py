"""The snapshot store: immutable versions with digests, kept as long as someone may need them."""
