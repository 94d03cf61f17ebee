"""Peak device memory and time of pruning one linear, by method. Needs a GPU.

    python -m tests.benchmarks.site_memory --rows 4096 --columns 11008

Random weights and inputs; the peak counts weight, statistics and everything a method allocates, but
not the calibration activations: batches are made one at a time.
"""

from __future__ import annotations

import argparse
import time

import torch

from llmsqueeze.calibrate import Site
from llmsqueeze.device import exact_matmul
from llmsqueeze.numerics.stats import InputStats
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.site import prune_site

RECIPES = (
    {"method": "wanda"},
    {"method": "wanda", "refit": "pcg"},
    {"method": "sparsegpt"},
    {"method": "dsnot"},
    {"method": "dsnot", "config": {"swap": "quadratic"}},
    {"method": "admm", "dense_share": 0.0},
    {},
    {"target": {"pattern": "2:4"}},
)
BATCH = (8, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, weight [{args.rows}, {args.columns}] bf16")
    print("| recipe | peak device memory | seconds |\n| --- | --- | --- |")
    for raw in RECIPES:
        recipe = PruneRecipe.from_dict(raw)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weight = torch.randn(args.rows, args.columns, device=device).bfloat16()
        stats = gather(recipe, args, device)
        torch.cuda.synchronize()
        started = time.monotonic()
        with exact_matmul(), torch.no_grad():
            prune_site(Site("site", weight, stats), recipe.target, recipe)
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated()
        name = f"{recipe.method} + {recipe.refit}, {recipe.target.pattern_name}"
        if recipe.config != PruneRecipe.from_dict({"method": recipe.method}).config:
            name += f", {recipe.config}"
        print(f"| {name} | {peak / 1e9:.2f} GB | {seconds:.2f} |", flush=True)
        del weight, stats


def gather(recipe: PruneRecipe, args: argparse.Namespace, device: torch.device) -> InputStats:
    """Statistics of random inputs, with an eighth held out where there is a refit."""
    needs = recipe.needs | {"probe"}
    share = recipe.dense_share if "product" in needs else 0.0

    def new() -> InputStats:
        width = args.rows if share else None
        return InputStats(args.columns, needs, device, dense_share=share, drift_width=width)

    stats = new()
    if recipe.refit != "none":
        stats.held_out = new()
    scale = torch.rand(args.columns, device=device).mul(3).exp()
    for index in range(args.batches):
        x = (torch.randn(*BATCH, args.columns, device=device) * scale).bfloat16()
        drift = torch.randn(*BATCH, args.rows, device=device).bfloat16() if share else None
        stats.update(x, x, drift)
        if stats.held_out is not None and index == 0:
            stats.held_out.update(x, x, drift)
    return stats


if __name__ == "__main__":
    main()
