"""What is told of experts that got few tokens."""

from __future__ import annotations

from llmsqueeze.artifact import SiteRecord


def few_tokens(sites: dict[str, SiteRecord]) -> str | None:
    """What is worth a warning where experts got too few tokens to be pruned as other linears were."""
    routed = {n: r.report for n, r in sites.items() if "routed_tokens" in r.report}
    by = {
        method: [name for name, report in routed.items() if f"by_{method}" in report]
        for method in ("wanda", "magnitude")
    }
    few = [name for names in by.values() for name in names]
    if not few:
        return None
    least = min(few, key=lambda name: routed[name]["routed_tokens"])
    methods = " and ".join(f"{len(names)} by {method}" for method, names in by.items() if names)
    return (
        f"{len(few)} of {len(routed)} linears of experts got too few tokens and were pruned otherwise, "
        f"{methods}; least: {least}, {routed[least]['routed_tokens']}"
    )
