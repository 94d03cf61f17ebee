"""What importing costs: help without torch, methods without torch, no CUDA at import."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = (
    "import sys; heavy = ('torch', 'transformers', 'numpy', 'lm_eval', 'datasets');"
    "print(sorted(m for m in heavy if m in sys.modules))"
)


def loaded(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import llmsqueeze",
        "import llmsqueeze.cli as c; c.cli.main(['--help'], standalone_mode=False)",
        "import llmsqueeze.cli as c; c.cli.main(['prune', '--help'], standalone_mode=False)",
        "import llmsqueeze.cli as c; c.cli.main(['eval', '--help'], standalone_mode=False)",
        "import llmsqueeze.cli as c; c.cli.main(['recipe', 'schema'], standalone_mode=False)",
        "import llmsqueeze.cli as c; c.recipe.main(['show', '--preset=fastest'], standalone_mode=False)",
        "from llmsqueeze.methods import *; [weight_method(m) for m in WEIGHT_METHODS]",
    ],
)
def test_no_heavy_import(code: str) -> None:
    assert loaded(code) == "[]"


def test_importing_everything_leaves_cuda_alone() -> None:
    code = (
        "import llmsqueeze.compress, llmsqueeze.evaluate, llmsqueeze.runtime, torch;"
        "assert not torch.cuda.is_initialized()"
    )
    assert "torch" in loaded(code)
