"""All rules together: one weight and one mask for each token. Pure, and without gradient. docs/algorithms

Order: what has no finite log-probs; what condemns a trajectory or a run; what condemns a token; then the weight. Every
rule judges what the sampler gave, not what other rules left, so that its share of the removals is its own.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from palimpsest.services.learner.corrections import m2po, sequence_rules, token_rules
from palimpsest.services.learner.corrections.ratios import log_ratio
from palimpsest.services.learner.corrections.rules import ESTIMATES, Correction, Gather, Limits, Rules
from palimpsest.services.learner.corrections.weights import weights

Part = tuple[Tensor, Tensor, Tensor, Tensor]
"""proximal, behavior, mask, missing: [rows, tokens] each, of one micro-batch."""


def correct(
    proximal: Tensor, behavior: Tensor, mask: Tensor, *, missing: Tensor, rules: Rules, limits: Limits
) -> Correction:
    """Weight and mask of each token. All arguments [rows, tokens], whole trajectories in rows.

    proximal, behavior: log-probs, nats; mask: bool, trainable tokens; missing: bool, there is no proximal. Numbers off
    the mask have no influence. limits: of the whole minibatch; see `limits`. Raises ValueError for other shapes, masks
    that are not boolean, and M2PO without its threshold.
    """
    log_discrepancy, usable, unusable = _discrepancy(proximal, behavior, mask, missing)
    causes = unusable | _of_sequences(log_discrepancy, usable, mask, rules)
    causes |= _of_tokens(proximal.detach(), behavior.detach(), log_discrepancy, usable, rules)
    if rules.m2 is not None:
        if limits.m2_threshold is None:
            raise ValueError("m2 needs the threshold of the whole minibatch: compute it with limits() first")
        causes["m2"] = m2po.m2_rule(log_discrepancy, usable, limits.m2_threshold)
    masked = torch.stack(list(causes.values())).any(dim=0)
    weight = weights(
        log_discrepancy,
        usable,
        kind=rules.weight,
        level=rules.weight_level,
        low=rules.weight_low,
        high=rules.weight_high,
    )
    zero = torch.zeros((), device=mask.device)
    return Correction(torch.where(mask & ~masked, weight / limits.normalizer, zero), masked, causes)


def limits(parts: Sequence[Part], rules: Rules, *, gather: Gather) -> Limits:
    """Of a minibatch: parts are this rank's micro-batches, perhaps none; `gather` (ProcessGroup.gather) brings all
    ranks'.

    All ranks call it with the same rules and get the same numbers. Raises ValueError as `correct`.
    """
    threshold = None
    if rules.m2 is not None:
        judged = [_discrepancy(*part) for part in parts]
        tokens = [log_discrepancy[usable].cpu() for log_discrepancy, usable, _ in judged]
        threshold = m2po.m2_threshold(torch.cat([torch.empty(0), *tokens]), rules.m2, gather=gather)
    unscaled = Limits(m2_threshold=threshold)
    if not rules.weight_normalize:
        return unscaled
    total, count = 0.0, 0
    for proximal, behavior, mask, missing in parts:
        correction = correct(proximal, behavior, mask, missing=missing, rules=rules, limits=unscaled)
        total += float(correction.weight.double().sum())
        count += int((mask & ~correction.masked).sum())
    shares = gather((total, count))
    kept = sum(share[1] for share in shares)
    return Limits(sum(share[0] for share in shares) / kept if kept else 1.0, threshold)


def alone(causes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each cause removes that no other does; with `overlap` these make up all that is masked, each token once."""
    once = _times(causes) == 1
    return {cause: removed & once for cause, removed in causes.items()}


def overlap(causes: Mapping[str, Tensor]) -> Tensor:
    """What more than one cause removes. bool [rows, tokens]"""
    return _times(causes) > 1


def _times(causes: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(causes.values())).sum(dim=0)


def _discrepancy(
    proximal: Tensor, behavior: Tensor, mask: Tensor, missing: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """log pi_prox / mu (0 where it is not usable); where it is usable; why it is not elsewhere on the mask."""
    for name, values in (("mask", mask), ("missing", missing)):
        # the complement of an integer mask is not 0 or 1, and counting it gives nonsense
        if values.dtype != torch.bool:
            raise ValueError(f"{name} is {values.dtype}: only a boolean tensor has a complement; give `{name}.bool()`")
    shapes = {tuple(values.shape) for values in (proximal, behavior, mask, missing)}
    if len(shapes) > 1 or mask.dim() != 2:
        raise ValueError(f"proximal, behavior, mask and missing are [rows, tokens] alike, but here {sorted(shapes)}")
    proximal, behavior, missing = proximal.detach(), behavior.detach(), mask & missing
    # where the proximal is missing, the number that stands there is nobody's and says nothing
    nonfinite = mask & ~(torch.isfinite(behavior) & (torch.isfinite(proximal) | missing))
    usable = mask & ~nonfinite & ~missing
    return log_ratio(proximal, behavior, usable), usable, {"nonfinite": nonfinite, "missing": missing}


def _of_sequences(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, rules: Rules) -> dict[str, Tensor]:
    causes: dict[str, Tensor] = {}
    switches: tuple[tuple[str, Callable[..., Tensor]], ...] = (
        ("veto", sequence_rules.veto_rule),
        ("sequence", sequence_rules.sequence_rule),
        ("geometric", sequence_rules.geometric_rule),
        ("segment", sequence_rules.segment_rule),
    )
    for name, rule in switches:
        if (bound := getattr(rules, name)) is not None:
            causes[name] = rule(log_discrepancy, usable, mask, bound)
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
