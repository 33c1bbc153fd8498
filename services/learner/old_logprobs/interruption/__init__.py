"""A cut, seen from the learner: stop the workers, score what they have sampled, go on."""
