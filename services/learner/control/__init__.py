"""Control of a running learner: changes of settings and actions, over REST, at safe points of the loop."""
