"""Our perplexity against a plain transformers loop over the same windows, alternating.

python -m tests.benchmarks.eval_speed --windows 4 --seqlen 512
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import evaluation_windows, load_tokenizer
from llmsqueeze.device import choose_device
from llmsqueeze.evaluate import perplexity
from llmsqueeze.runtime import load
from llmsqueeze.source import locate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    cache = Path("~/.cache/llmsqueeze").expanduser()
    path = locate(args.checkpoint, offline=True, cache=cache, note=print).path
    device = choose_device(args.device)
    model = load(Checkpoint(path), torch.float32, device)
    windows = evaluation_windows(
        None, load_tokenizer(path), seqlen=args.seqlen, windows=args.windows
    ).tokens

    def plain() -> float:
        losses = []
        with torch.no_grad():
            for window in windows.to(device):
                losses.append(float(model(window[None], labels=window[None]).loss))
        return math.exp(sum(losses) / len(losses))

    mine, theirs = [], []
    for _ in range(args.repeat):
        started = time.monotonic()
        ours = perplexity(model, windows).token_ppl
        mine.append(time.monotonic() - started)
        started = time.monotonic()
        reference = plain()
        theirs.append(time.monotonic() - started)
    print(
        json.dumps(
            {
                "token_ppl": ours,
                "token_ppl_plain": reference,
                "seconds": statistics.median(mine),
                "seconds_plain": statistics.median(theirs),
                "ratio": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
            }
        )
    )


if __name__ == "__main__":
    main()
