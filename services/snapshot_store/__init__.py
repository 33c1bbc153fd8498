"""The snapshot store: immutable versions with digests, kept while a lease needs them."""
