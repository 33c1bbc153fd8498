"""The untrained model, and the supervised steps that teach it the form of a renderer.

The arguments and answers in the dialogues are random and unrelated to the questions: the model learns no task.
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
    """Return a Qwen3 with random weights: about 0.12 M parameters if tied, as the small Qwen3 models are."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            head_dim=HEAD,  # the attention of vLLM on CPU needs a multiple of 32
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
            initializer_range=DEVIATION,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=pad,
        )
    )


def warm_start(model: Qwen3ForCausalLM, renderer: ChatRenderer, *, steps: int, seed: int) -> float:
    """Train on dialogues with random arguments. Returns the last loss, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = [_row(renderer, *each) for each in transcripts(steps * BATCH, seed)]
    random.Random(seed).shuffle(rows)  # noqa: S311
    loss = torch.zeros(())
    for step in range(steps):
        tokens, mask = _pad(rows[step * BATCH : (step + 1) * BATCH])
        logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        loss = -(logprobs * mask[:, 1:]).sum() / mask[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def _row(renderer: ChatRenderer, messages: Transcript, tools: list[dict[str, object]]) -> tuple[list[int], list[float]]:
    """Return the tokens as the rollout worker assembles them, and 1.0 for each token of a model message, else 0.0."""
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    tokens = list(renderer.begin(messages[:first], tools))
    mask = [0.0] * len(tokens)
    for i in range(first, len(messages)):
        if messages[i].role == "assistant":
            message = [*renderer.encode(messages[i].content), renderer.stop_tokens[0]]
            tokens += message
            mask += [1.0] * len(message)
        else:
            between = renderer.render_turn_separator([messages[i]], ended_by=renderer.stop_tokens[0])
            tokens += between
            mask += [0.0] * len(between)
    return tokens, mask


def _pad(rows: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    return (
        torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows]),
        torch.tensor([mask + [0.0] * (longest - len(mask)) for _, mask in rows]),
    )
