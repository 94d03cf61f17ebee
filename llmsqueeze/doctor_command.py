"""`llmsqueeze doctor`: what this machine has, and whether it computes right."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import common
from llmsqueeze.errors import EnvironmentFault, RecipeError

if TYPE_CHECKING:
    from llmsqueeze.console import Console


@click.command(
    help="""Show versions, GPUs and compiled kernels, and test every operator on small weights.

Exit code 4 if an operator computes wrong.
"""
)
@click.option("--warm", is_flag=True,
              help="Compile all kernels now, so that no run has to wait for one.")  # fmt: skip
@click.option("--arch", metavar="SM", help="Architecture to compile for with --warm, as sm_90; "
              "needs no GPU.  [default: this GPU's]")  # fmt: skip
@common
def doctor(console: Console, warm: bool, arch: str | None) -> None:
    if arch and not warm:
        raise RecipeError("--arch belongs to --warm")
    if arch and not re.fullmatch(r"sm_\d{2,3}", arch):
        raise RecipeError(f"--arch {arch}: an architecture is written sm_80, sm_90 and so on")

    import torch

    from llmsqueeze import doctor as library
    from llmsqueeze.console import facts, size

    found = library.gpus()
    count = None
    if warm:
        from llmsqueeze.ops.cuda import architecture
        from llmsqueeze.ops.variants import warm as compile_all

        if not arch:
            if not found:
                raise EnvironmentFault("no GPU is visible to torch; name one with --arch, as sm_90")
            arch = architecture(0)[0]
        with console.steps() as progress:
            count = compile_all(arch, on_kernel=lambda done, of: progress("kernel", done, of, ""))
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i, gpu in enumerate(found) if gpu["kernels"] is None]
    checks = [check for device in devices for check in library.self_test(device)]
    if wrong := [check for check in checks if not check.passed]:
        bad = wrong[0]
        raise EnvironmentFault(
            f"{bad.operator} computes wrong on {bad.device}: off by {bad.error:.2g}"
        )
    folder, cached = library.cached_kernels()
    document: dict[str, Any] = {
        "versions": library.versions(),
        "gpus": found,
        "cpu_kernels": library.cpu_kernels(),
        "kernels": {"folder": str(folder), "compiled": cached, "warmed": count, "arch": arch},
        "checks": [
            {"operator": c.operator, "device": c.device, "error": c.error, "seconds": c.seconds}
            for c in checks
        ],
    }  # fmt: skip
    rows = dict(document["versions"])
    for gpu in found:
        why = gpu["kernels"]
        rows[str(gpu["name"])] = (
            f"{gpu['compute_capability']}, {size(int(str(gpu['memory_bytes'])))}, kernels: {why or 'yes'}"
        )
    if not found:
        rows["GPU"] = "none visible to torch"
    rows["kernels for the CPU"] = document["cpu_kernels"] or (
        "not built, no C++ compiler was there: compressed weights are made dense"
    )
    rows["compiled kernels"] = f"{cached} in {folder}" + (f", {count} for {arch}" if count else "")
    for check in checks:
        rows[f"{check.operator}, {check.device}"] = f"right, off by {check.error:.1e}"
    console.result(document, facts("llmsqueeze doctor", rows))
