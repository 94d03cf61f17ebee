"""Nothing that runs code found in data: no pickle, no eval, no remote code. Read off the syntax tree, so that
a comment is no finding and an alias no escape."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "llmsqueeze").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Modules whose every use is one too many, and what may be taken of them all the same.
MODULE_NAMES = {
    "pickle": {"pickle.UnpicklingError"},  # torch.load(weights_only=True) raises it
    **{name: set() for name in ("_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")},
    **{name: set() for name in ("code", "codeop", "runpy", "imp", "pty")},
}
NAMES = {
    *("eval", "exec", "compile", "__import__"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *(
        "os.system",
        "os.popen",
        "os.startfile",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
    ),
    *("asyncio.create_subprocess_shell", "ctypes.pythonapi"),
    *("importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader"),
    *("importlib.machinery.ExtensionFileLoader", "torch.jit.load", "torch.hub", "torch.package"),
    *("torch.serialization.add_safe_globals", "numpy.lib.format.read_array"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load"),
    *(
        "yaml.unsafe_load_all",
        "yaml.Loader",
        "yaml.FullLoader",
        "yaml.UnsafeLoader",
        "yaml.CLoader",
    ),
    *("yaml.CFullLoader", "yaml.CUnsafeLoader"),
}
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
# A keyword, wherever it stands, and the only value that it may have.
KEYWORDS = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True}
# Calls that need a keyword to be safe: by the end of their names.
NEEDED = {"torch.load": "weights_only"}
REMOTE = ("from_pretrained", "from_config", "load_dataset")
# Classes of transformers that read plain JSON, or a model that was looked at: they have no code to trust.
PLAIN = ("GenerationConfig.from_pretrained",)
# Where modules are found by name: in tables of this package.
IMPORTS = {"llmsqueeze/methods/__init__.py"}


def findings(text: str, name: str = "") -> list[str]:
    """What a module does that none may, each with its line."""
    tree = ast.parse(text)
    aliases: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for entry in node.names:
                whole = entry.name if entry.asname else entry.name.split(".")[0]
                aliases[entry.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for entry in node.names:
                aliases[entry.asname or entry.name] = f"{node.module}.{entry.name}"

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            # What was not imported is a variable, whatever it is called.
            return aliases.get(node.id, f"({node.id})")
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return "?"

    def check(path: str, line: int) -> None:
        module = path.split(".")[0]
        if module in MODULE_NAMES and path != module and path not in MODULE_NAMES[module]:
            found.append((line, path))
        if path in NAMES or path.startswith(PREFIXES):
            found.append((line, path))

    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for entry in node.names:
                check(f"{node.module}.{entry.name}", node.lineno)
        elif isinstance(node, ast.Import):
            for entry in node.names:
                module = entry.name.split(".")[0]
                if module in MODULE_NAMES and (module != "pickle" or entry.asname):
                    found.append((node.lineno, entry.name))
        elif isinstance(node, ast.Attribute):
            check(dotted(node), node.lineno)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            # A builtin that is not called may be on its way to be.
            path = aliases.get(node.id, node.id)
            if path in NAMES and (id(node) in called or node.id in aliases or "." not in path):
                found.append((node.lineno, path))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in (
                    "trust_remote_code",
                    "allow_pickle",
                ):
                    wanted = KEYWORDS[key.value]
                    if not (isinstance(value, ast.Constant) and value.value is wanted):
                        found.append((node.lineno, f"{key.value} is not {wanted}"))
        if isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in _of_call(node, dotted(node.func), name)]
    return [f"{name}:{line}: {what}" for line, what in sorted(set(found))]


def _of_call(node: ast.Call, path: str, name: str) -> list[str]:
    found: list[str] = []
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    for keyword, wanted in KEYWORDS.items():
        value = given.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is wanted):
            found.append(f"{path} with {keyword} not {wanted}")
    for end, keyword in NEEDED.items():
        if path == end and keyword not in given:
            found.append(f"{path} without {keyword}")
    last = path.rpartition(".")[2]
    if last in REMOTE and not path.endswith(PLAIN) and "trust_remote_code" not in given:
        found.append(f"{path} without trust_remote_code")
    asked = node.args[1] if path == "(getattr)" and len(node.args) > 1 else None
    if isinstance(asked, ast.Constant) and asked.value in ("eval", "exec", "system", "loads"):
        found.append(f"getattr {asked.value}")
    if path == "importlib.import_module" and name not in IMPORTS:
        found.append(path)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p",
        "from pickle import loads",
        "from pickle import loads as read\nread(b)",
        "import cloudpickle",
        "import marshal\nmarshal.loads(b)",
        "import shelve",
        "eval(text)",
        "run = exec",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.exec(text)",
        "from builtins import eval as e\ne(text)",
        "getattr(model, 'eval')()",
        "__import__(name)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f)",
        "import torch\ntorch.jit.load(f)",
        "import torch\ntorch.hub.load(r, m)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=asked)",
        "options = {'trust_remote_code': True}",
        "import datasets\ndatasets.load_dataset(name)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import UnsafeLoader",
        "import os\nos.system(line)",
        "from os import system\nsystem(line)",
        "import os\nos.execvp(a, b)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib.util import spec_from_file_location",
        "import runpy",
    ],
)
def test_what_runs_code_is_found(text: str) -> None:
    assert findings(text)


@pytest.mark.parametrize(
    "text",
    [
        '"""Never pickle.load, eval( or trust_remote_code=True."""',
        "model.eval()",
        "import re\nre.compile(pattern)",
        "import torch\ntorch.compile(model)",
        "import pickle\ntry: ...\nexcept pickle.UnpicklingError: ...",
        "import torch\ntorch.load(f, weights_only=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "import yaml\nyaml.safe_load(text)\nyaml.SafeLoader",
        "import subprocess\nsubprocess.run([a, b])",
        "import json\njson.load(f)",
        "def evaluate(exec_options: int) -> int: return exec_options",
    ],
)
def test_what_does_not_is_let_pass(text: str) -> None:
    assert findings(text) == []
