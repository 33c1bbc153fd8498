"""Experts to replay that follow from the tokens alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Routes
from palimpsest.services.learner.model.routing import routers_of
from palimpsest.services.learner.proximal.types import Exact
from tests.learner_parts.models import CurrentModel

EXPERTS, OF_TOKEN = 8, 2
"""Of the small mixtures of families.py."""


def routes_of(tokens: np.ndarray, layers: int) -> Routes:
    """The experts of each token and layer: [..., layers, experts of a token]."""
    places = np.arange(layers)[:, None] + np.arange(OF_TOKEN)
    routes: Routes = ((tokens[..., None, None] + places) % EXPERTS).astype(np.int16)
    return routes


class WithRoutes(CurrentModel):
    """Lets a mixture replay experts that follow from the tokens alone."""

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact:
        own, layers = super().proximal(batches, now, fresh), len(routers_of(self.model))
        return replace(own, routes=[routes_of(batch.tokens, layers) for batch in batches]) if layers else own
