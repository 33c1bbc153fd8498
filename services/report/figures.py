"""The report's figures, in the order of the page. Pure."""

from palimpsest.services.report import distributions, learning, measures, policies, progress
from palimpsest.services.report.charts import Figure
from palimpsest.services.report.folder import Contents


def figures(contents: Contents) -> list[Figure]:
    """Return all figures, optional ones last. A run without versions has the same figures, without data."""
    lines, log = contents.lines, contents.log
    always = [
        learning.over_versions(lines),
        learning.over_time(lines),
        policies.factors_by_staleness(lines),
        policies.discrepancy_over_versions(lines),
        policies.staleness_ratio_over_versions(lines),
        policies.removed_by_staleness(lines),
        policies.staleness_over_versions(lines),
        policies.fates_by_duration(lines),
        progress.timeline(lines, log.applied, contents.config.rollout.canary_tolerance),
        progress.where_the_time_went(lines),
    ]
    optional = (
        measures.of_batches(lines),
        measures.of_workers_and_lengths(lines),
        distributions.spreads(lines),
        distributions.leaks(lines),
    )
    return [
        *always,
        *(figure for figure in optional if figure is not None),
    ]
