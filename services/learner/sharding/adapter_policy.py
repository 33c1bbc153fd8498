"""An adapter in training on weights that are split over the ranks (learner.lora with learner.sharding).

The frozen weights are shards in bf16. The adapter is small: every rank holds all of it, with masters and moments, as a
replicated learner does. So gradients are summed, clipped and applied as without sharding, with the same bits, and
versions and checkpoints hold the adapter as rank 0 has it.
"""

from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.sharding.sharded_model import ShardedModel


class AdapterPolicy(TrainablePolicy):
    """See TrainablePolicy. A pass needs all ranks."""

    model: ShardedModel
