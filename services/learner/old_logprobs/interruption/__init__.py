"""The learner's side of a cut: pause the workers, score the tokens that they have sampled, resume the workers."""
