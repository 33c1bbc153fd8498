"""An environment of your own: sums of two one-digit numbers, from reasoning-gym's chain_sum.

PYTHONPATH=examples make run RUN=examples/short_sums.toml
"""

import reasoning_gym

from palimpsest.env import Message, Opening, Outcome, Score, Turn, digest

INSTRUCTION = "Answer with the number only."


class ShortSum:
    """One sum, answered without tools.

    reasoning-gym's score: 1 for the right number alone, and for a longer text with that number the number's share of
    its characters. So the reward rises when answers become shorter, and when more of them are right.
    """

    version = "reasoning-gym-0.1.25"

    def reset(self, seed: int) -> Opening:
        """Generate the sum of this seed."""
        self._dataset = reasoning_gym.create_dataset("chain_sum", seed=seed, size=1, max_terms=2, max_digits=1)
        self._entry = self._dataset[0]
        return Opening((Message(role="user", content=f"{self._entry['question']}\n{INSTRUCTION}"),))

    def step(self, turn: Turn) -> Outcome:
        """Score the answer."""
        reward = self._dataset.score_answer(turn.text, self._entry)
        return Score(reward, reward >= 1)

    def finalize(self) -> Score:
        """Score a session without a complete answer."""
        return Score(0.0, False)

    def state_hash(self) -> str:
        """Return a hash of the sum."""
        return digest(self._entry["question"])
