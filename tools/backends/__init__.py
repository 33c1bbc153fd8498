"""Kafka and MinIO servers on this machine, for tests and for cluster runs without a cluster.

Nothing is installed into the system: Maven downloads the jars of Kafka, and Go builds MinIO, once into a cache outside
the checkout. Not for production: the servers keep one replica and listen on 127.0.0.1.

    python -m tools.backends up      # start both, print addresses and credentials
    python -m tools.backends status
    python -m tools.backends down    # stop what `up` started
"""
