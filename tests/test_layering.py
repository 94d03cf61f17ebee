"""Rules of the code base: imports flow one way, only the console prints, modules stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmsqueeze"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a module may import from the package, as prefixes. Absent: anything.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "untrusted": (),
    "gguf_header": ("untrusted",),
    "_version": (),
    "native": ("errors",),
    "numerics": ("numerics", "native"),
    "architectures": ("errors",),
    "experts": ("architectures", "errors"),
    "device": ("errors",),
    "methods": ("methods", "numerics", "architectures", "errors"),
    "ops": ("ops", "numerics", "native", "errors"),
    "side_files": ("ranks", "shards", "errors"),
    "activation": ("policy", "shards", "side_files", "numerics.histogram", "errors"),
    "kv_record": ("methods", "shards", "side_files", "errors"),
    "observe": ("stand_in",),
    "stand_in": (),
    "recipe": ("methods", "recipe_keys", "errors"),
    "recipe_keys": ("errors",),
    "recipe_file": ("untrusted", "errors"),
    "presets": (),
    "policy": ("errors",),
    "shards": ("ranks", "untrusted", "errors"),
    "ranks": ("computing", "device", "world", "errors"),
    "computing": ("__version__",),
    "world": (),
    "parts": ("blocks", "numerics", "ranks", "world"),
    "artifact": (
        "ranks",
        "activation",
        "kv_record",
        "shards",
        "side_files",
        "encodings",
        "untrusted",
        "errors",
        "__version__",
    ),
    "checkpoint": (
        "activation",
        "architectures",
        "artifact",
        "config_file",
        "encodings",
        "experts",
        "kv_record",
        "shards",
        "untrusted",
        "errors",
    ),
    "config_file": ("untrusted", "errors"),
    "encodings": ("numerics",),
    "encode_recipe": ("recipe_keys", "errors"),
    "sparsify_recipe": ("methods", "policy", "recipe", "errors"),
    "step_recipes": (
        "encode_recipe",
        "kv_recipe",
        "recipe",
        "sparsify_recipe",
        "errors",
    ),
    "conditions": ("errors",),
    "recovery": ("conditions", "errors"),
    "data": ("untrusted", "errors"),
    "source": ("gguf_header", "shards", "untrusted", "errors"),
    "streams": (),
    "parking": ("shards", "errors"),
    "blocks": ("checkpoint", "device", "experts", "parking", "streams", "errors"),
    "calibrate": (
        "blocks",
        "checkpoint",
        "experts",
        "numerics",
        "parking",
        "parts",
        "ranks",
        "streams",
        "errors",
    ),
    "integration": (
        "activation",
        "policy",
        "artifact",
        "checkpoint",
        "encodings",
        "experts",
        "runtime",
        "errors",
    ),
    "runtime": (
        "runtime",
        "stand_in",
        "integration",
        "activation",
        "policy",
        "kv_record",
        "methods",
        "ops",
        "numerics",
        "checkpoint",
        "shards",
        "untrusted",
        "errors",
    ),
    "evaluate": ("device", "errors"),
    "subject": ("activation", "checkpoint", "policy", "runtime"),
    "harness": (
        "activation",
        "checkpoint",
        "data",
        "device",
        "evaluate",
        "ops",
        "policy",
        "runtime",
        "subject",
        "errors",
    ),
    "tasks": ("harness", "recipe_file", "recovery", "untrusted", "errors"),
    "task_cache": ("shards", "untrusted", "errors", "__version__"),
    "dense_gemv": (),
    "doctor": ("numerics", "ops", "errors"),
    "bench": ("dense_gemv", "numerics", "ops", "errors"),
    "bench_model": ("bench", "checkpoint", "evaluate", "ops", "runtime", "errors"),
    "bench_cpu": ("bench", "bench_model", "checkpoint", "ops", "runtime", "errors"),
    "capacity": ("checkpoint", "numerics", "ops", "runtime", "traffic"),
    "passkey": ("device", "evaluate", "errors"),
    "card": (
        "activation",
        "checkpoint",
        "kv_record",
        "recipe",
        "recipe_file",
        "source",
        "untrusted",
    ),
    "hub_card": ("artifact", "card", "report", "step_recipes", "units", "errors"),
    "push": ("artifact", "card", "checkpoint", "shards", "errors", "__version__"),
    "kv_calibration": (
        "blocks",
        "numerics",
        "observe",
        "parts",
        "runtime.positions",
        "runtime.spans",
        "errors",
    ),
    "kv_recipe": ("methods", "recipe", "errors"),
    "units": (),
    "report": (
        "report",
        "activation",
        "artifact",
        "checkpoint",
        "expert_note",
        "numerics",
        "traffic",
        "units",
        "untrusted",
        "errors",
        "__version__",
    ),
    "expert_note": ("artifact",),
    "site": ("calibrate", "methods", "numerics", "recipe"),
    "state_file": ("shards", "errors"),
    "fingerprint": ("shards", "errors"),
    "training_state": ("methods", "state_file", "errors"),
    "work": ("blocks", "device", "ranks", "state_file", "errors"),
    "footprint": (
        "blocks",
        "checkpoint",
        "kv_calibration",
        "numerics",
        "recipe",
        "shards",
        "traffic",
    ),
    "allocator": (),
    "plan": (
        "allocator",
        "blocks",
        "calibrate",
        "checkpoint",
        "data",
        "footprint",
        "methods",
        "parking",
        "parts",
        "ranks",
        "recipe",
        "work",
        "errors",
    ),
}

# What talks to people: only its own modules may use it.
COMMANDS = (
    "bench_command",
    "completion_command",
    "compress_command",
    "doctor_command",
    "eval_command",
    "plan_command",
    "prune_command",
    "push_command",
    "recipe_command",
    "recipe_options",
    "quantize_kv_command",
    "report_command",
    "run_command",
    "sparsify_command",
)
SKIN = ("cli", "command", "console", "interrupt", "launch", "__main__", *COMMANDS)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    """Names below the package that a module imports, function bodies and type checking included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmsqueeze":
            inside = (node.module or "").removeprefix("llmsqueeze").lstrip(".")
            names = [alias.name for alias in node.names]
            found += [inside] if inside else names
        elif isinstance(node, ast.Import):
            found += [
                a.name.removeprefix("llmsqueeze.")
                for a in node.names
                if a.name.startswith("llmsqueeze.")
            ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_flow_one_way(path: Path) -> None:
    name = name_of(path)
    layer = name.split(".")[0]
    for imported in imports(path):
        assert imported.split(".")[0] not in SKIN or layer in SKIN
        if layer in ALLOWED:
            assert imported.startswith(ALLOWED[layer]), f"{name} must not import {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_console_prints(path: Path) -> None:
    if name_of(path) == "console":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
    assert path.stem not in ("utils", "helpers", "common")


def test_every_package_is_installed() -> None:
    """An editable installation has them all anyway: only users would miss one."""
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert listed
    found = {
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
        if path.parent.name not in ("_calib_data", "_kernels")
    }
    folders = {"llmsqueeze._calib_data", "llmsqueeze._kernels"}
    assert set(re.findall(r'"(.*?)"', listed[1])) == found | folders
