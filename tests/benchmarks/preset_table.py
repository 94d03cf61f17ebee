"""What the presets of `compress` cost and save: README's table.

    python tests/benchmarks/preset_table.py TEXT [--windows 30] [--presets fastest balanced careful]

TEXT is WikiText-2 raw test. Size on disk, bytes of weights read per token, bits of the KV cache, perplexity
over the dense model's on the same windows, seconds and peak memory of compress.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmsqueeze.presets import PRESETS


def run(*args: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmsqueeze", *map(str, args), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    args = parser.parse_args()
    text = ["--text", args.text, "--windows", args.windows]
    print(
        "| `--preset` | size, MB | read per token, MB | KV bits | perplexity | × dense | seconds | peak MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.json"
        measured = run("eval", args.checkpoint, *text)
        dense.write_text(json.dumps(measured))
        size, read = measured["size_bytes"], measured["bytes_per_token"]
        print(
            f"| none | {size / 1e6:.1f} | {read / 1e6:.1f} | 16 | {measured['token_ppl']:.2f} | 1 | | |"
        )
        for name in args.presets:
            out = Path(folder) / name
            made = run("compress", args.checkpoint, "-o", out, "--preset", name)
            found = run("eval", out, *text, "--baseline", dense)
            seconds = sum(walk["seconds"] for walk in made["walks"])
            bits = found.get("kv_cache", {}).get("bits_per_element", 16)
            print(
                f"| `{name}` | {made['bytes']['after'] / 1e6:.1f} | {found['bytes_per_token'] / 1e6:.1f} | "
                f"{bits:.2f} | {found['token_ppl']:.2f} | {found['token_ppl_ratio']:.3f} | {seconds:.0f} | "
                f"{made['peak_rss_bytes'] / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
