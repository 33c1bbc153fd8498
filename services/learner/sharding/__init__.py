"""Training with a model that is split over the ranks (FSDP2)."""
