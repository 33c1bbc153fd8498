"""The model, and the few supervised steps that teach it the form of a dialogue.

The arguments and answers it is shown are random and unrelated to what is asked: what to say is left to learn.
"""

import random

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from palimpsest.services.rollout.chat_renderer import ChatRenderer
from tools.starting_model.transcripts import Transcript, transcripts

STEPS, BATCH, LEARNING_RATE = 60, 64, 3e-3
HIDDEN, LAYERS, HEADS, KEY_HEADS, HEAD = 64, 2, 4, 2, 32
DEVIATION = 0.08


def untrained(vocabulary: int, eos: int, pad: int, *, tied: bool, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights: about 0.12 M parameters when tied, as the real small Qwen3 are."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            head_dim=HEAD,  # the CPU engine's attention wants a multiple of 32
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
            initializer_range=DEVIATION,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=pad,
        )
    )


def warm_start(model: Qwen3ForCausalLM, dialogue: ChatRenderer, *, steps: int, seed: int) -> float:
    """Supervised steps on dialogues with random arguments; the last loss, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = [_row(dialogue, *each) for each in transcripts(steps * BATCH, seed)]
    random.Random(seed).shuffle(rows)  # noqa: S311
    loss = torch.zeros(())
    for step in range(steps):
        tokens, said = _pad(rows[step * BATCH : (step + 1) * BATCH])
        logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        loss = -(logprobs * said[:, 1:]).sum() / said[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def _row(dialogue: ChatRenderer, messages: Transcript, tools: list[dict[str, object]]) -> tuple[list[int], list[float]]:
    """Tokens as the rollout worker would put them together, and which of them the model says."""
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    tokens = list(dialogue.begin(messages[:first], tools))
    said = [0.0] * len(tokens)
    for i in range(first, len(messages)):
        if messages[i].role == "assistant":
            message = [*dialogue.encode(messages[i].content), dialogue.stop_tokens[0]]
            tokens += message
            said += [1.0] * len(message)
        else:
            between = dialogue.render_turn_separator([messages[i]], ended_by=dialogue.stop_tokens[0])
            tokens += between
            said += [0.0] * len(between)
    return tokens, said


def _pad(rows: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    return (
        torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows]),
        torch.tensor([said + [0.0] * (longest - len(said)) for _, said in rows]),
    )
