"""Combine all correction rules into one weight and one mask per token. Pure, without gradient (docs/algorithms).

Order: tokens without finite log-probs, rules for trajectories and runs, rules for tokens, then the weight. Each rule
judges all sampled tokens, including tokens that other rules remove, so the count of a rule does not depend on the
others.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from palimpsest.services.learner.corrections import m2po, sequence_rules, token_rules
from palimpsest.services.learner.corrections.ratios import LOG_RATIO_BOUND, unclamped_log_ratio
from palimpsest.services.learner.corrections.rules import ESTIMATES, Correction, Gather, Limits, Rules
from palimpsest.services.learner.corrections.weights import weights

Part = tuple[Tensor, Tensor, Tensor, Tensor]
"""proximal, behavior, mask, missing of one micro-batch: [rows, tokens] each."""


def correct(
    proximal: Tensor, behavior: Tensor, mask: Tensor, *, missing: Tensor, rules: Rules, limits: Limits
) -> Correction:
    """Return the weight and the mask of each token. All tensors are [rows, tokens]; a row holds one trajectory.

    proximal, behavior: log-probs, nats; mask: bool, trainable tokens; missing: bool, tokens without a proximal. Values
    off the mask have no influence. limits: of the minibatch; see `limits`. Raises ValueError for differing shapes,
    masks that are not boolean, and M2PO without its threshold.
    """
    unclamped, usable, unusable = _discrepancy(proximal, behavior, mask, missing)
    log_discrepancy = unclamped.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    causes = unusable | _of_sequences(unclamped, log_discrepancy, usable, mask, rules)
    causes |= _of_tokens(proximal.detach(), behavior.detach(), log_discrepancy, usable, rules)
    if rules.m2 is not None:
        if limits.m2_threshold is None:
            raise ValueError("m2 needs the threshold of the whole minibatch: compute it with limits() first")
        causes["m2"] = m2po.m2_rule(log_discrepancy, usable, limits.m2_threshold)
    masked = torch.stack(list(causes.values())).any(dim=0)
    weight = weights(
        unclamped,
        usable,
        kind=rules.weight,
        level=rules.weight_level,
        low=rules.weight_low,
        high=rules.weight_high,
    )
    zero = torch.zeros((), device=mask.device)
    return Correction(torch.where(mask & ~masked, weight / limits.normalizer, zero), masked, causes)


def limits(parts: Sequence[Part], rules: Rules, *, gather: Gather) -> Limits:
    """Return the limits of a minibatch. parts: this rank's micro-batches, possibly none.

    gather: returns the values of all ranks (ProcessGroup.all_gather_object). All ranks call this function with the same
    rules and get the same result. Raises ValueError as `correct` does.
    """
    threshold = None
    if rules.m2 is not None:
        judged = [_discrepancy(*part) for part in parts]
        tokens = [unclamped[usable].clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).cpu() for unclamped, usable, _ in judged]
        threshold = m2po.m2_threshold(torch.cat([torch.empty(0), *tokens]), rules.m2, gather=gather)
    unscaled = Limits(m2_threshold=threshold)
    if not rules.weight_normalize:
        return unscaled
    total, count = 0.0, 0
    for proximal, behavior, mask, missing in parts:
        correction = correct(proximal, behavior, mask, missing=missing, rules=rules, limits=unscaled)
        kept, weight = mask & ~correction.masked, correction.weight.double()
        if rules.weight_level == "sequence":  # all kept tokens of a row have its weight: count the row once
            total += float(weight.amax(dim=1).sum()) if weight.numel() else 0.0
            count += int(kept.any(dim=1).sum())
        else:
            total += float(weight.sum())
            count += int(kept.sum())
    shares = gather((total, count))
    counted = sum(share[1] for share in shares)
    return Limits(sum(share[0] for share in shares) / counted if counted else 1.0, threshold)


def alone(causes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokens that only one cause removes, by cause. With `overlap` they cover each masked token once."""
    once = _times(causes) == 1
    return {cause: removed & once for cause, removed in causes.items()}


def overlap(causes: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens that more than one cause removes. bool [rows, tokens]"""
    return _times(causes) > 1


def _times(causes: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(causes.values())).sum(dim=0)


def _discrepancy(
    proximal: Tensor, behavior: Tensor, mask: Tensor, missing: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return unclamped log pi_prox / mu (0 where not usable), the usable tokens, and the others by cause."""
    for name, values in (("mask", mask), ("missing", missing)):
        # `~` on an integer mask gives -1 and -2, so counts of the complement would be wrong
        if values.dtype != torch.bool:
            raise ValueError(f"{name} is {values.dtype}; it must be torch.bool (use `{name}.bool()`)")
    shapes = {tuple(values.shape) for values in (proximal, behavior, mask, missing)}
    if len(shapes) > 1 or mask.dim() != 2:
        raise ValueError(
            f"proximal, behavior, mask and missing must have one shape [rows, tokens], got {sorted(shapes)}"
        )
    proximal, behavior, missing = proximal.detach(), behavior.detach(), mask & missing
    # a missing proximal holds an arbitrary value; do not test it
    nonfinite = mask & ~(torch.isfinite(behavior) & (torch.isfinite(proximal) | missing))
    usable = mask & ~nonfinite & ~missing
    return unclamped_log_ratio(proximal, behavior, usable), usable, {"nonfinite": nonfinite, "missing": missing}


def _of_sequences(
    unclamped: Tensor, log_discrepancy: Tensor, usable: Tensor, mask: Tensor, rules: Rules
) -> dict[str, Tensor]:
    """Return the removed tokens by rule. Sums over a row take unclamped log-ratios, all else the clamped ones."""
    causes: dict[str, Tensor] = {}
    switches: tuple[tuple[str, Callable[..., Tensor]], ...] = (
        ("veto", sequence_rules.veto_rule),
        ("sequence", sequence_rules.sequence_rule),
        ("geometric", sequence_rules.geometric_rule),
        ("segment", sequence_rules.segment_rule),
    )
    for name, rule in switches:
        if (bound := getattr(rules, name)) is not None:
            causes[name] = rule(unclamped, usable, mask, bound)
    for name in ESTIMATES:
        estimator, level = name.split("_", 1)
        if name in rules.estimates and level != "token":
            causes[name] = sequence_rules.estimate_rule(
                estimator, level, log_discrepancy, usable, mask, rules.estimates[name]
            )
    return causes


def _of_tokens(
    proximal: Tensor, behavior: Tensor, log_discrepancy: Tensor, usable: Tensor, rules: Rules
) -> dict[str, Tensor]:
    causes: dict[str, Tensor] = {}
    if rules.band is not None:
        causes |= token_rules.band_rule(log_discrepancy, usable, rules.band)
    if rules.tokens is not None:
        causes |= token_rules.tokens_rule(log_discrepancy, usable, rules.tokens)
    if rules.difference is not None:
        causes["difference"] = token_rules.difference_rule(proximal, behavior, usable, rules.difference)
    for name in ESTIMATES:
        estimator, level = name.split("_", 1)
        if name in rules.estimates and level == "token":
            causes[name] = token_rules.estimate_rule(estimator, log_discrepancy, usable, rules.estimates[name])
    return causes
