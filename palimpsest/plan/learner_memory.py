"""Memory of a rank of the learner, from the run's configuration and the rehearsed passes. Pure.

Without sharding, every rank holds the whole model and its optimizer (services/learner/model/trainable.py). With it,
each rank holds a share of the float32 masters, which are cast while a block is gathered, and of all that has their
shape (docs/sharding.md). With an adapter, the base is held once, and everything else has the adapter's shape
(docs/lora.md). With both, each rank holds all of the adapter, and a share of the base for each model. The arrays of the
loss are those of a batch whose rows all have the greatest length.
"""

from palimpsest.common.config.learner import AVERAGES, LearnerConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.schema import RunConfig
from palimpsest.plan.causes import Cause, Memory, Moment
from palimpsest.plan.loss_arrays import TOKENS, LossArrays, loss_arrays
from palimpsest.plan.rehearsal import PassShape, Rehearsed
from palimpsest.services.learner.model.logprobs import BLOCK_ENTRIES, BLOCK_ENTRIES_ELSEWHERE
from palimpsest.services.learner.sharding.tensor_owners import largest_share

FLOAT32, BFLOAT16 = 4, 2
ROW = "sampling.max_trajectory_tokens"
SCORING, TRAINING, STEP = "old log-probs", "training pass", "optimizer step"
RESULTS = "minibatch: log-probs, weights and masks"
AVERAGE, BASELINE = "average of the weights, float32", "gradients of the baseline, float32"
BLOCKS_GATHERED = {True: 3, False: 2}
"""On a GPU and on a CPU: bf16 weights of blocks that FSDP2 holds at one time. The block that computes, and the received
bytes of it or of the next one; on a GPU of both, because these are in the memory of another stream, which keeps it."""
FLOAT32_BLOCKS = 3
"""Blocks of float32 logits that are live at one time in services/learner/model/logprobs.py."""


def learner_memory(
    config: LearnerConfig, rehearsed: Rehearsed, shape: PassShape, *, ranks: int, samples: int, gpu: bool
) -> Memory:
    """Return the memory of a rank. samples: tasks.samples_per_group. gpu: whether the rank runs on a GPU, where more
    logits are float32 at a time, and results of earlier minibatches are in the host's memory."""
    shares = ranks if config.sharding != "none" else 1
    of_trained = 1 if config.lora.rank else shares
    optimizer, arrays = _optimizer(rehearsed, of_trained), loss_arrays(config)
    batch, minibatch = (rows * shape.length for rows in _rows(config, shape, ranks=ranks, samples=samples))
    held = [*_held(config, rehearsed, shares, of_trained), *_batch(arrays, batch)]
    copies = _copies(rehearsed, shares) if config.sharding != "none" and not config.lora.rank else ()
    results = _results(arrays, minibatch if gpu else batch, split=gpu and config.minibatches > 1)
    moments = tuple(
        _with_loss(moment, arrays, results, batch, shape)
        for moment in _moments(config, rehearsed, shape, ranks=ranks, shares=of_trained, gpu=gpu)
    )
    if config.offload == "optimizer":
        host = [cause for cause in held if cause.name in (AVERAGE, BASELINE)]  # where the masters are
        gpu_held = tuple(cause for cause in held if cause not in host)
        step = [cause for cause in moments[-1].causes if cause != results]
        return Memory(gpu_held, moments[:-1], host=(*optimizer, *host, *step, *copies))
    first = held[:1] if _holds_weights(config) else []
    return Memory((*first, *optimizer, *held[len(first) :]), moments, host=copies)


def pass_shape(config: LearnerConfig, longest: int, attention: str, *, most_rows: int | None = None) -> PassShape:
    """Return the largest pass. longest: sampling.max_trajectory_tokens. most_rows: of a rank in a version; None: any.

    A row longer than micro_batch_tokens has a pass to itself. A packed pass is filled up with shorter rows.
    """
    length, packed = max(1, longest), config.layout == "packed"
    fitting = 1 if config.vcpo.baseline else max(1, config.micro_batch_tokens // length)
    rows = fitting if most_rows is None else max(1, min(fitting, most_rows))
    filled = packed and not config.vcpo.baseline and rows != most_rows
    rest = max(0, config.micro_batch_tokens - rows * length) if filled else 0
    every = config.activation_checkpointing_every if config.activation_checkpointing else 0
    return PassShape(
        rows, length, config.logprob_chunk_tokens, every, attention, packed, rest, config.lora, config.context_parallel
    )


def most_rows(config: RunConfig) -> int | None:
    """Return the greatest number of rows of a rank in a version; None if a trajectory may have several rows."""
    if config.rollout.agents:
        return None  # each branch of an agent's dialogue is a row
    learner = config.learner
    shares = max(1, config.local.learner_ranks // learner.context_parallel)
    groups = -(-learner.groups_per_batch // learner.minibatches)  # each minibatch is dealt to the ranks by itself
    return learner.minibatches * -(-groups * config.tasks.samples_per_group // shares)


def _holds_weights(config: LearnerConfig) -> bool:
    """Whether a rank holds weights of the policy that compute, besides the masters."""
    return config.sharding == "none" or config.lora.rank > 0


def _rows(config: LearnerConfig, shape: PassShape, *, ranks: int, samples: int) -> tuple[int, int]:
    """Rows of a rank in a version, and in a minibatch. Every trajectory counts as one row."""
    shares = ranks // shape.context
    of_minibatch = -(-config.groups_per_batch // config.minibatches)
    return -(-config.groups_per_batch * samples // shares), -(-of_minibatch * samples // shares)


def _batch(arrays: LossArrays, entries: int) -> list[Cause]:
    """What a rank holds for all rows of a version."""
    keys = ("learner.groups_per_batch", "tasks.samples_per_group", ROW)
    return [Cause(f"batch: {name}", size * entries, keys) for name, size in arrays.of_batch.items()]


def _results(arrays: LossArrays, entries: int, *, split: bool) -> Cause:
    keys = ("learner.groups_per_batch", "tasks.samples_per_group", ROW, *(("learner.minibatches",) if split else ()))
    return Cause(RESULTS, arrays.of_results * entries, keys)


def _with_loss(moment: Moment, arrays: LossArrays, results: Cause, batch: int, shape: PassShape) -> Moment:
    """Add the arrays of the loss to those of the model."""
    own: tuple[Cause, ...] = (results,)
    if moment.name == SCORING:  # its passes have other rows together
        own = (Cause("batches of the scoring passes", arrays.of_batch[TOKENS] * batch, results.keys[:3]),)
    elif moment.name == TRAINING:
        entries = len(shape.lengths) * shape.length
        own = (results, Cause("loss of one pass", arrays.of_pass * entries, ("learner.micro_batch_tokens",)))
    return Moment(moment.name, (*moment.causes, *own))


def _optimizer(rehearsed: Rehearsed, shares: int) -> list[Cause]:
    """What learner.offload moves to the host. shares: ranks over which it is split."""
    each = -(-FLOAT32 * rehearsed.model.trained // shares)
    split = ("learner.offload", *(("local.learner_ranks",) if shares > 1 else ()))
    return [
        Cause("masters, float32", each, split),
        Cause("gradients, float32", each, split),
        Cause("moments of AdamW, float32", 2 * each, split),
    ]


def _copies(rehearsed: Rehearsed, shares: int) -> tuple[Cause, ...]:
    """What the rank with most tensors keeps of the newest version and of its parent. Without sharding, and of an
    adapter, rank 0 alone keeps copies."""
    size = 2 * largest_share(rehearsed.model.published, shares)
    return (Cause("own tensors of two versions, to encode them", size, ("local.learner_ranks",)),)


def _held(config: LearnerConfig, rehearsed: Rehearsed, shares: int, of_trained: int) -> list[Cause]:
    """What stays on the GPU; the weights first, if the rank holds them. shares: ranks over which frozen weights are
    split; of_trained: over which trained ones are."""
    model, kind = rehearsed.model, config.proximal.kind
    each, split = -(-FLOAT32 * model.trained // of_trained), ("local.learner_ranks",) if shares > 1 else ()
    adapter = config.lora.rank > 0 and config.sharding != "none"
    shard = -(-(model.weights - model.copied) // shares)
    copied = shard + model.copied if adapter else -(-model.copied // shares)
    causes = []
    if _holds_weights(config):
        causes.append(Cause("weights", copied if adapter else model.weights, split if adapter else ()))
    if kind == "snapshot":
        causes.append(Cause("weights of an old version", copied, ("learner.proximal.kind", *split)))
    if kind in AVERAGES:
        keys = ("learner.proximal.kind", *split)
        causes.append(Cause(AVERAGE, each, keys))
        causes.append(Cause("average in the model's type", copied, keys))
    if config.audit.fraction and not PROXIMAL_KINDS[kind].exact:
        causes.append(Cause("weights of an old version, for the audit", copied, ("learner.audit.fraction",)))
    if config.loss.kl.weight:
        causes.append(Cause("weights of version 0", copied, ("learner.loss.kl.weight",)))
    if config.advantages.kind == "gae":
        size = -(-4 * FLOAT32 * model.decoder_parameters // of_trained)
        if _holds_weights(config):
            size += model.decoder_weights
        if adapter:
            size += -(-model.decoder_frozen // shares)
        causes.append(Cause("critic with its optimizer", size, ("learner.advantages.kind", *split)))
    if config.vcpo.baseline:
        causes.append(Cause(BASELINE, 2 * each, ("learner.vcpo.baseline",)))
    return causes


def _moments(
    config: LearnerConfig, rehearsed: Rehearsed, shape: PassShape, *, ranks: int, shares: int, gpu: bool
) -> list[Moment]:
    tokens = "learner.micro_batch_tokens"
    pass_keys = (tokens,) if shape.length < config.micro_batch_tokens else (ROW, tokens)
    again = {0: ("learner.activation_checkpointing",), 1: ()}
    kept_keys = (*again.get(shape.activation_checkpointing, ("learner.activation_checkpointing_every",)), *pass_keys)
    chunk = ("learner.logprob_chunk_tokens",)
    logits = Cause("float32 logits of a GPU's larger blocks", _larger_blocks(rehearsed, shape) if gpu else 0, chunk)
    more = (logits,) if logits.size else ()
    gathered = _gathered_weights(rehearsed, BLOCKS_GATHERED[gpu]) if config.sharding != "none" else ()
    gathered = gathered[:1] if config.lora.rank else gathered  # frozen weights have no gradients
    training = (
        Cause("activations kept for the backward pass", rehearsed.kept, kept_keys),
        Cause("other tensors of the passes", rehearsed.training - rehearsed.kept, (*chunk, *pass_keys)),
        *more,
        *gathered,
        *_keys(rehearsed, shape),
    )
    step = [Cause("denominators of AdamW, float32", -(-rehearsed.step // shares))]
    if ranks > 1 and shares == 1:
        step = [max(step[0], Cause("sum of the gradients over the ranks", FLOAT32 * rehearsed.model.trained),
                    key=lambda cause: cause.size)]  # fmt: skip
    scoring = Cause("tensors of a scoring pass", rehearsed.scoring, pass_keys)
    return [
        Moment(SCORING, (scoring, *more, *gathered[:1], *_keys(rehearsed, shape, backward=False))),
        Moment(TRAINING, training),
        Moment(STEP, tuple(step)),
    ]


def _gathered_weights(rehearsed: Rehearsed, blocks: int) -> tuple[Cause, ...]:
    """What a rank gathers for its passes, the gradients that wait until those of the block, or of the weights outside
    the blocks, are complete, and those that it sends to the other ranks."""
    model = rehearsed.model
    return (
        Cause("weights gathered from the ranks, bf16", BFLOAT16 * (model.outside + blocks * model.largest_block)),
        Cause("gradients that wait to be sent, bf16", BFLOAT16 * (model.outside + model.largest_block)),
        Cause("gradients sent to the ranks, float32", FLOAT32 * max(model.outside, model.largest_block)),
    )


def _keys(rehearsed: Rehearsed, shape: PassShape, *, backward: bool = True) -> tuple[Cause, ...]:
    """Keys and values that a rank gathers from those it shares rows with. A layer holds them until its backward pass;
    the layer that computes has them in two orders, and their gradients."""
    if shape.context == 1:
        return ()
    model, every = rehearsed.model, shape.activation_checkpointing
    held = model.layers - (-(-model.layers // every) if every else 0) if backward else 0
    size = (held + (3 if backward else 2)) * shape.context * shape.own_tokens * model.key_bytes
    keys = ("learner.activation_checkpointing",) if held else ()
    return (Cause("keys and values of the ranks that share rows", size, (*keys, "learner.micro_batch_tokens")),)


def _larger_blocks(rehearsed: Rehearsed, shape: PassShape) -> int:
    """Bytes by which the float32 blocks of a GPU exceed those of the rehearsal, which has a CPU's."""
    logits = min(shape.chunk, shape.own_tokens) * rehearsed.model.vocabulary
    blocks = [min(logits, entries) for entries in (BLOCK_ENTRIES_ELSEWHERE, BLOCK_ENTRIES["cpu"])]
    return FLOAT32_BLOCKS * FLOAT32 * (blocks[0] - blocks[1])
