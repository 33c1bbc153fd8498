"""Published methods as settings of `learner`: `recipe = "NAME"` applies them below the keys that a run sets.

A recipe consists of keys only: `--check` prints the result. docs/algorithms/recipes.md cites the source of each.
"""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

EXACT = {"kind": "snapshot"}
NEITHER: Mapping[str, Any] = {"weight": "off", "band": "off"}
"""r_d = 1: no weight, no mask."""
BOTH: Mapping[str, Any] = {"weight": "ratio", "band": 2.0}

TABLE: dict[str, dict[str, Any]] = {
    # the unifying table of docs/algorithms/recipes.md: choice of discrepancy and of staleness ratio
    "ppo_clip": {"proximal": EXACT, "discrepancy": NEITHER},
    "ppo_clip_train_infer": {"proximal": {"kind": "bypass"}, "discrepancy": NEITHER},
    "decoupled_exact": {"proximal": EXACT, "discrepancy": BOTH},
    "ppo_ewma": {"proximal": {"kind": "ewma_prox"}, "discrepancy": NEITHER},
    "ppo_ewma_train_infer": {"proximal": {"kind": "ewma_prox"}, "discrepancy": BOTH},
    "linear_prox": {"proximal": {"kind": "linear_prox"}, "discrepancy": NEITHER},
    "decoupled_async": {"proximal": {"kind": "current_recompute"}, "discrepancy": BOTH},
}
NEIGHBORS: dict[str, dict[str, Any]] = {
    "ppo_ewma_async": {"proximal": {"kind": "ppo_ewma_async"}, "discrepancy": BOTH},
    "a3po": {"proximal": {"kind": "interp_prox_loglinear"}, "discrepancy": NEITHER},
    "bypass": {"proximal": {"kind": "bypass"}, "discrepancy": NEITHER},
    "tis": {"proximal": EXACT, "discrepancy": {"weight": "truncated", "weight_high": 2.0, "band": "off"}},
    "cis": {
        "proximal": EXACT,
        "discrepancy": {"weight": "clipped", "weight_low": 0.5, "weight_high": 2.0, "band": "off"},
    },
    "mis": {"proximal": EXACT, "discrepancy": {"weight": "ratio", "band": "off", "tokens": [0.5, 2.0]}},
    "icepop": {
        "proximal": EXACT,
        "discrepancy": {"weight": "ratio", "band": "off", "tokens": [0.5, 5.0]},
        "loss": {"aggregation": "seq_mean_token_mean"},
    },
    "geometric": {
        "proximal": EXACT,
        "discrepancy": {"weight": "off", "band": "off", "geometric": [0.999, 1.001], "veto": 1e-4},
    },
    "sequence_rejection": {
        "proximal": EXACT,
        "discrepancy": {"weight": "off", "band": "off", "sequence": [0.5, 2.0], "veto": 1e-4},
    },
    "dapo": {"proximal": EXACT, "discrepancy": NEITHER, "loss": {"clip_low": 0.2, "clip_high": 0.28}},
    "dual_clip": {"proximal": EXACT, "discrepancy": NEITHER, "loss": {"dual_clip": 3.0}},
    "gspo": {
        "proximal": EXACT,
        "discrepancy": NEITHER,
        "loss": {"objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq_mean_token_mean"},
    },
    "cispo": {"proximal": EXACT, "discrepancy": BOTH, "loss": {"objective": "cispo", "clip_low": 1.0}},
    "minirl": {
        "proximal": EXACT,
        "discrepancy": NEITHER,
        "loss": {"objective": "minirl", "aggregation": "seq_mean_token_sum"},
        "advantages": {"kind": "dr_grpo"},
    },
    "r2vpo": {"proximal": EXACT, "discrepancy": BOTH, "loss": {"objective": "r2vpo"}},
    "m2po": {
        "proximal": {"kind": "bypass"},
        "discrepancy": NEITHER,
        "loss": {"objective": "m2po", "clip_low": 0.3, "clip_high": 0.5, "m2po": {"budget": 0.04}},
    },
    "opsm": {"proximal": EXACT, "discrepancy": BOTH, "loss": {"opsm": 1e-4}},
    "vcpo": {
        "proximal": {"kind": "current_recompute"},
        "discrepancy": {"weight": "truncated", "weight_level": "sequence", "weight_high": 8.0, "band": "off"},
        "loss": {"objective": "policy_gradient", "aggregation": "seq_mean_token_sum"},
        "advantages": {"kind": "dr_grpo"},
        "vcpo": {"lr_scaling": "sqrt", "baseline": True},
    },
    "epo": {"proximal": EXACT, "discrepancy": BOTH, "loss": {"entropy": 1e-3, "epo": {"weight": 1e-3, "phase": 150}}},
    "dr_grpo": {
        "proximal": EXACT,
        "discrepancy": BOTH,
        "loss": {"aggregation": "dr_grpo"},
        "advantages": {"kind": "dr_grpo"},
    },
    "rloo": {
        "proximal": EXACT,
        "discrepancy": BOTH,
        "loss": {"aggregation": "seq_mean_token_sum"},
        "advantages": {"kind": "rloo"},
    },
    "reinforce_pp": {
        "proximal": EXACT,
        "discrepancy": BOTH,
        "loss": {"kl": {"weight": 1e-4, "estimator": "k1", "place": "reward"}},
        "advantages": {"kind": "reinforce_pp"},
    },
    "ppo_gae": {"proximal": EXACT, "discrepancy": BOTH, "advantages": {"kind": "gae"}},
}
RECIPES: dict[str, dict[str, Any]] = TABLE | NEIGHBORS


def unknown(name: str) -> str | None:
    """Return an error text if the recipe does not exist. Returns None for an existing recipe and for an empty name."""
    if name in RECIPES or not name:
        return None
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(RECIPES))}"
    return f"there is no recipe {name!r}; {hint}"


def apply_recipe(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `learner` keys of the recipe, overridden by those of the run.

    If the run chooses another kind of proximal, the proximal keys of the recipe do not apply.

    >>> apply_recipe("dapo", {"versions": 3, "loss": {"clip_high": 0.5}})["loss"]
    {'clip_low': 0.2, 'clip_high': 0.5}
    """
    merged = copy.deepcopy(RECIPES[name])
    chosen = own.get("proximal")
    if isinstance(chosen, Mapping) and chosen.get("kind") not in (None, merged["proximal"]["kind"]):
        merged["proximal"] = {}
    return _merge(merged, own)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged
