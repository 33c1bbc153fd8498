"""Parts of a learner, assembled for tests: models, ingest, cuts, corrections."""
