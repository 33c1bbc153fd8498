"""Real Kafka and MinIO servers of one machine, for tests and for trying a cluster's run without a cluster.

Nothing is installed into the system: Kafka's published jars come by Maven, MinIO is built by Go, both once into a
cache outside the checkout. Not for production: one copy of everything, on 127.0.0.1.

    python -m tools.backends up      # start both, print addresses and credentials
    python -m tools.backends status
    python -m tools.backends down    # stop what `up` started
"""
