"""Time of a gated checkpoint against its dense source on this machine: decoding, and windows.

    python -m tests.benchmarks.gated_speed --sparsity 0.5

The ratio is the median over rounds in which both take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.device import choose_device
from llmsqueeze.policy import Policy
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import gating_of
from llmsqueeze.source import locate
from llmsqueeze.sparsify import sparsify
from llmsqueeze.sparsify_recipe import SparsifyRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", default="wina")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = choose_device(args.device)
    cache = Path("~/.cache/llmsqueeze").expanduser()
    source = Checkpoint(locate(args.checkpoint, offline=True, cache=cache, note=print).path)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        recipe = {"method": args.method, "sparsity": args.sparsity}
        recipe["calibration"] = {"samples": 2, "seqlen": 256}
        sparsify(source, "benchmark", out, SparsifyRecipe.from_dict(recipe), device)
        made = Checkpoint(out)
        for dtype in (torch.float32, torch.bfloat16):
            compare(load(source, dtype, device), load(made, dtype, device), args, str(dtype))


def compare(
    dense: torch.nn.Module, gated: torch.nn.Module, args: argparse.Namespace, dtype: str
) -> None:
    device = next(dense.parameters()).device
    prompt = torch.randint(100, 40000, (1, 32), device=device)
    window = torch.randint(100, 40000, (1, 512), device=device)
    gating = gating_of(gated)
    assert gating is not None
    gating.policy = Policy("all")

    def decode(model: torch.nn.Module) -> None:
        model.generate(
            prompt, do_sample=False, min_new_tokens=args.tokens, max_new_tokens=args.tokens
        )

    @torch.no_grad()
    def whole(model: torch.nn.Module) -> None:
        model(window, use_cache=False)

    for what, run in (("decoding", decode), ("a window of 512", whole)):
        ratios = []
        for _ in range(args.rounds):
            before = clock(run, dense)
            ratios.append(clock(run, gated) / before)
        print(f"{dtype}, {what}: gated / dense {statistics.median(ratios):.3f}", flush=True)


def clock(run: Callable[[torch.nn.Module], None], model: torch.nn.Module) -> float:
    started = time.perf_counter()
    run(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
