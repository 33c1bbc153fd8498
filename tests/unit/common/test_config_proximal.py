"""The table of proximal kinds: one row per kind of the configuration."""

from typing import get_args

import pytest

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import EXACT_KINDS, PROXIMAL_KINDS, ExactConfig, SurrogateConfig

SECTIONS = {
    kind: section
    for section in (*get_args(ExactConfig), *get_args(SurrogateConfig))
    for kind in get_args(section.model_fields["kind"].annotation)
}


def test_every_kind_has_one_row_with_its_section() -> None:
    assert {kind: row.section for kind, row in PROXIMAL_KINDS.items()} == SECTIONS


def test_exact_kinds_have_a_policy_for_missing_values() -> None:
    assert {SECTIONS[kind] for kind in EXACT_KINDS} == set(get_args(ExactConfig))
    assert all(("missing" in section.model_fields) is (kind in EXACT_KINDS) for kind, section in SECTIONS.items())


@pytest.mark.parametrize("kind", PROXIMAL_KINDS)
def test_only_exact_kinds_have_a_route(kind: str) -> None:
    row = PROXIMAL_KINDS[kind]
    assert (row.route != "none") is row.exact
    assert (row.runs_replicas, row.cuts_workers) == (kind == "replica", kind == "interruption")


@pytest.mark.parametrize("kind", PROXIMAL_KINDS)
def test_the_configuration_reads_the_table(kind: str) -> None:
    keys = {"versions": 1, "proximal": {"kind": kind}}
    row = PROXIMAL_KINDS[kind]
    refused = {
        "audit": ({"fraction": 0.5}, row.exact),
        "discrepancy": ({"weight_normalize": True}, row.per_forward_pass),
    }
    for section, (values, wrong) in refused.items():
        if wrong:
            with pytest.raises(ValueError, match=kind):
                LearnerConfig.model_validate(keys | {section: values})
        else:
            LearnerConfig.model_validate(keys | {section: values})
