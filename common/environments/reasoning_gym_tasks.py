"""Generated tasks of reasoning-gym, with a calculator that makes them multi-turn.

The user message is the dataset's question. The model may calculate up to eight times and ends with a message without a
tool call; the dataset scores its text, or the text inside <answer></answer>. Some datasets give partial scores for
wrong answers; `success` means a full score.
"""

import math
import re
from typing import Any

from palimpsest.common.environments.calculator import TOOL, NotArithmetic, calculate
from palimpsest.common.environments.port import (
    Message,
    Opening,
    Outcome,
    Reply,
    Score,
    ToolCall,
    Turn,
    digest,
    generator,
)
from palimpsest.common.environments.single_call import ToolFailed, argument

MAX_CALLS = 8
MAX_TURNS = MAX_CALLS + 2
"""One more call after the last permitted one gets an error as its result."""

INSTRUCTION = "You can use the calculator. End with a message that is the answer and nothing else, without a tool call."

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

_NAMES = """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation binary_matrix
bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip
color_cube_rotation complex_arithmetic count_bits count_primes countdown course_schedule cryptarithm
decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification
futoshiki game_of_life game_of_life_halting gcd graph_color group_anagrams gsm_symbolic intermediate_integration
isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting letter_counting
letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid n_queens
needle_haystack number_filtering number_format number_sequence number_sorting palindrome_generation
palindrome_partitioning path_star polynomial_equations polynomial_multiplication pool_matrix power_function
prime_factorization products propositional_logic puzzle24 quantum_lock ransom_note rearc rectangle_count
rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering shortest_path
simple_equations simple_geometry simple_integration sokoban spell_backward spiral_matrix string_insertion
string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego
word_ladder word_sequence_reversal word_sorting zebra_puzzles
"""
DATASETS = tuple(_NAMES.split())
"""The datasets of reasoning-gym 0.1.25, except `composite`, which combines others. They are listed here because the
import of the library takes seconds."""


class ReasoningGymTask:
    """One task of one dataset."""

    version = "reasoning-gym-0.1.25"

    def __init__(self, dataset: str) -> None:
        self._name = dataset

    def reset(self, seed: int) -> Opening:
        """Generate the task of this seed."""
        import reasoning_gym  # imported in the child, not in the gateway's process

        self._dataset = reasoning_gym.create_dataset(self._name, seed=_small(seed), size=1)
        self._entry: dict[str, Any] = self._dataset[0]
        self._turns = self._calls = 0
        question = str(self._entry["question"])
        return Opening((Message(role="user", content=f"{question}\n\n{INSTRUCTION}"),), (TOOL,))

    def step(self, turn: Turn) -> Outcome:
        """Calculate, or score the answer."""
        self._turns += 1
        if turn.answer is not None:
            return self._score(turn.answer)
        if self._turns == MAX_TURNS:
            return self.finalize()
        results = [self._result(call) for call in turn.calls]
        return Reply(
            tuple(Message(role="tool", content=str(result)) for result in results),
            tool_errors=sum(isinstance(result, ToolFailed) for result in results),
        )

    def finalize(self) -> Score:
        """Return the score of a session without an answer."""
        return Score(0.0, False, {"answer": 0.0})

    def state_hash(self) -> str:
        """Return a hash of the question, its answer and the numbers of turns and calls."""
        return digest(self._name, str(self._entry["question"]), str(self._entry["answer"]), self._turns, self._calls)

    def _result(self, call: ToolCall) -> str | ToolFailed:
        try:
            expression = argument(call, tool="calculator", name="expression")
            if self._calls == MAX_CALLS:
                return ToolFailed(f"the calculator was used {MAX_CALLS} times: answer now")
            self._calls += 1
            return calculate(expression)
        except ToolFailed as failed:
            return failed
        except NotArithmetic as error:
            return ToolFailed(str(error))

    def _score(self, text: str) -> Score:
        marked = _ANSWER.findall(text)
        score = float(self._dataset.score_answer((marked[-1] if marked else text).strip(), self._entry))
        if math.isnan(score):
            raise ValueError(f"{self._name} scored {text[:100]!r} as nan")
        reward = min(max(score, 0.0), 1.0)
        return Score(reward, score >= 1, {"answer": reward})


def _small(seed: int) -> int:
    """Return the seed if it fits into 32 bits (some datasets use numpy's generator), else one derived from it."""
    return seed if 0 <= seed < 2**32 else generator(seed).getrandbits(32)
