"""How many groups may be unresolved: fewer than the staleness bound permits while the learner never waits. Pure.

A group waits as long as the queue before it. Where the learner is the bottleneck, a shorter queue lowers the staleness
and keeps the learner busy (docs/algorithms/admission.md).
"""

WAIT_SHARE = 0.01
"""The learner counts as waiting for a batch from this share of the time since the last batch."""
WINDOW = 8
"""Number of batches in a row without a wait, before the limit falls."""


class AdmissionLimit:
    """The limit on unresolved groups, between one batch and `highest`.

    It falls by a quarter of a batch if, for WINDOW batches, the learner did not wait and three quarters of a batch were
    complete beyond the batch that it took. It rises by half a batch when the learner waits. Between the two it stays.

    >>> limit = AdmissionLimit(groups_per_batch=4, highest=16)
    >>> for _ in range(8): limit.observe(surplus=3, waited=False)
    >>> limit.groups
    15
    >>> limit.observe(surplus=0, waited=True)
    >>> limit.groups
    16
    """

    def __init__(self, *, groups_per_batch: int, highest: int) -> None:
        self._lowest, self._highest = groups_per_batch, highest
        self._down, self._up = max(1, groups_per_batch // 4), max(1, groups_per_batch // 2)
        self._calm = 0
        self.groups = highest
        """The limit."""

    def resize(self, highest: int) -> None:
        """Use another highest limit. A limit at the highest stays there; another one only falls."""
        self.groups = highest if self.groups == self._highest else min(self.groups, highest)
        self._highest = highest

    def observe(self, *, surplus: int, waited: bool) -> None:
        """Note a batch. surplus: complete groups that the batch left; waited: whether the learner waited for it."""
        if waited:
            self.groups, self._calm = min(self._highest, self.groups + self._up), 0
        elif surplus < self._up + self._down:
            self._calm = 0
        else:
            self._calm += 1
        if self._calm == WINDOW:
            self.groups, self._calm = max(self._lowest, self.groups - self._down), 0
