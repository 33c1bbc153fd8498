"""A taskset of verifiers for tests: `say N words`; the reward is 1 if the reply has an even number of characters."""

from collections.abc import Iterator

import verifiers.v1 as vf


class Words(vf.Task[vf.TaskData]):
    @vf.reward
    async def even(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or "") % 2 == 0)


class WordsTaskset(vf.Taskset[Words, vf.TasksetConfig]):
    def load(self) -> Iterator[Words]:
        for number in range(6):
            yield Words(vf.TaskData(prompt=f"What is the value of amber {number}?"), self.config.task)


__all__ = ["WordsTaskset"]
