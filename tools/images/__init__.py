"""Builds the image of the gateway and the store without Docker: Debian's Python, the pinned packages, this checkout.

Nothing is installed into the system: apt downloads mmdebstrap, and mmdebstrap Debian's packages, once into a cache
outside the checkout.

    python -m tools.images light palimpsest-light.tar    # `docker load`, `podman load` and `skopeo copy` read this file
"""
