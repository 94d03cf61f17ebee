"""Time of pruning a small random model on one and on several CPU ranks, with one thread each.

    python -m tests.benchmarks.rank_scaling --ranks 1 2

Ranks that compute share the cores: no more of them than there are cores say anything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import save_tokenizer, tiny_model

METHODS: dict[str, list[str]] = {
    "wanda": ["--method", "wanda"],
    "sparsegpt": ["--method", "sparsegpt"],
    "default": [],
}
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=1, help="of these the shortest")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(
            num_hidden_layers=args.blocks,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            max_position_embeddings=args.seqlen,
        ).bfloat16().save_pretrained(folder / "source")
        save_tokenizer(folder / "source")
        lines = (f"line {i} squares to {i * i};" for i in range(args.samples * args.seqlen // 16))
        (folder / "text.txt").write_text(" ".join(lines))
        print("| method | " + " | ".join(f"{n} ranks" for n in args.ranks) + " |")
        print("| --- |" + " --- |" * len(args.ranks))
        for method in args.method:
            found: dict[int, float] = {}
            digests = set()
            for ranks in args.ranks * args.repeat:
                seconds, digest = run(folder, METHODS[method], ranks, args)
                found[ranks] = min(seconds, found.get(ranks, seconds))
                digests.add(digest)
            assert len(digests) == 1, "the bytes depend on the ranks"
            first = found[args.ranks[0]]
            cells = (f"{found[n]:.1f} s ({first / found[n]:.2f}×)" for n in args.ranks)
            print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


def run(
    folder: Path, options: list[str], ranks: int, args: argparse.Namespace
) -> tuple[float, str]:
    """Seconds, starting Python aside, and a hash of the checkpoint."""
    out = folder / f"out-{ranks}"
    command = [
        sys.executable, "-m", "llmsqueeze", "prune", str(folder / "source"), "-o", str(out),
        "--calib", str(folder / "text.txt"), "--samples", str(args.samples), "--seqlen", str(args.seqlen),
        "--device", "cpu", "--gpus", str(ranks), "--resume", "never", "--overwrite", "--json", "-q", *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **THREADS}
    )
    digest = hashlib.sha256()
    for path in sorted(out.iterdir()):
        digest.update(path.read_bytes())
    return json.loads(done.stdout)["seconds"], digest.hexdigest()


if __name__ == "__main__":
    main()
