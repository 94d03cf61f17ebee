"""What a stranger may have meant: one line and an exit code that blames the input, in a short time and little
memory, and nothing read, written or run that was not asked for. What tests/fuzz found is here as well."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsqueeze import data, runtime, source, untrusted
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.console import LONGEST
from llmsqueeze.errors import CheckpointError, DataError, RecipeError
from llmsqueeze.gguf_header import check_model
from llmsqueeze.gguf_header import read as read_gguf
from llmsqueeze.ops import cuda
from llmsqueeze.recipe_file import parse_yaml, read_recipe
from llmsqueeze.shards import MOST_HEADER, entry_name
from llmsqueeze.task_cache import TaskCache
from tests.test_report import model_result
from tests.test_source import tiny_gguf

Tiny = Callable[..., Path]
Cli = Callable[..., Any]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Ten seconds of a core for each test: a hang is what is looked for."""

    def ring(number: int, frame: FrameType | None) -> None:
        pytest.fail("it took too long")

    # A core's time for work without end, a clock for waiting without end.
    before = [(name, signal.signal(name, ring)) for name in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, 10)
    signal.setitimer(signal.ITIMER_REAL, 120)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for name, handler in before:
        signal.signal(name, handler)


def copy(source: Path, tmp_path: Path, **config: Any) -> Path:
    path = tmp_path / "copy"
    shutil.copytree(source, path)
    if config:
        known = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**known, **config}))
    return path


def one_line(result: Any, code: int) -> str:
    """The error of a command that failed as it should."""
    assert result.exit_code == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:"), result.stderr
    return str(lines[0])


@pytest.mark.skipif("sys.platform != 'linux'")
def test_a_short_pass_of_the_fuzzer() -> None:
    signal.setitimer(signal.ITIMER_REAL, 400)
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "3000", "--seed", "7"]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 kinds of failures, " in done.stdout


# Files that are none.

FILES = ["model.safetensors", "config.json", "llmsqueeze.json", "generation_config.json"]


@pytest.mark.skipif("not hasattr(os, 'mkfifo')")
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop", "nowhere"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_a_checkpoint(
    cli: Cli, squeezed: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = copy(squeezed, tmp_path)
    (path / name).unlink(missing_ok=True)
    make_other(path / name, kind)
    (tmp_path / "a.txt").write_text("a text of some length " * 20)
    command = ["eval", path, "--text", tmp_path / "a.txt", "--seqlen", 8, "--windows", 2, "-q"]
    result = cli(*command, "--device", "cpu")
    if name == "generation_config.json" and kind in ("loop", "nowhere"):
        assert result.exit_code == 0, result.stderr  # as if it were not there
    else:
        assert str(path) in one_line(result, 3)


def make_other(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nowhere": "absent"}[kind])


@pytest.mark.skipif("not hasattr(os, 'mkfifo')")
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop"])
def test_what_is_no_file_of_options(cli: Cli, tiny: Tiny, tmp_path: Path, kind: str) -> None:
    for name in ("a.txt", "a.jsonl", "a.yaml", "a.json"):
        make_other(tmp_path / name, kind)
    args = [tiny(), "-o", tmp_path / "out", "-q", "--device", "cpu", "--samples", 2, "--seqlen", 8]
    for name in ("a.txt", "a.jsonl"):
        assert name in one_line(cli("prune", *args, "--calib", tmp_path / name), 3)
    assert "a.txt" in one_line(cli("eval", tiny(), "--text", tmp_path / "a.txt", "-q"), 3)
    for name in ("a.yaml", "a.json"):
        assert name in one_line(cli("recipe", "validate", tmp_path / name), 2)
        assert name in one_line(
            cli("compress", tiny(), "-o", tmp_path / "o", "--recipe", tmp_path / name), 2
        )
    assert "a.json" in one_line(cli("report", tmp_path / "a.json", "-o", tmp_path / "r"), 3)
    assert "a.json" in one_line(cli("eval", tiny(), "--baseline", tmp_path / "a.json", "-q"), 3)


def test_empty_files(cli: Cli, squeezed: Path, tmp_path: Path) -> None:
    for name in (*FILES, "tokenizer.json"):
        path = copy(squeezed, tmp_path)
        (path / name).write_bytes(b"")
        result = cli("eval", path, "-q", "--seqlen", 8, "--windows", 1, "--device", "cpu")
        assert (str(path) if name == "tokenizer.json" else name) in one_line(result, 3)
        shutil.rmtree(path)


# Sizes.


def test_headers_and_texts_that_are_too_large(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    """Files with holes: they take no space, and must not take memory either."""
    path = copy(tiny(), tmp_path)
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 100 * 2**20))
        stream.truncate(200 * 2**20)
    assert f"at most {MOST_HEADER:,}" in one_line(cli("inspect", path), 3)
    sizes = {
        "config.json": 2**23,
        "a.txt": 2**31,
        "a.jsonl": 2**31,
        "a.yaml": 2**23,
        "a.json": 2**28,
    }
    for name, size in sizes.items():
        (path / name).touch()
        os.truncate(path / name, size)
    assert "larger than 4 MiB" in one_line(cli("inspect", path), 3)
    for name in ("a.txt", "a.jsonl"):
        args = ["--calib", path / name, "-o", tmp_path / "out", "-q", "--device", "cpu"]
        assert "larger than 1024 MiB" in one_line(cli("prune", tiny(), *args), 3)
    assert "larger than" in one_line(cli("recipe", "validate", path / "a.yaml"), 2)
    assert "larger than 64 MiB" in one_line(cli("report", path / "a.json", "-o", tmp_path / "r"), 3)


def test_a_text_in_one_line_is_not_tokenised_whole(tiny: Tiny, tmp_path: Path) -> None:
    """And what is taken of it is what the whole would begin with."""
    tokenizer = data.load_tokenizer(tiny())
    text = " ".join(str(i * i) for i in range(3000))
    (tmp_path / "short.txt").write_text(text)
    (tmp_path / "long.txt").write_text(text + " " + "x" * 40_000_000)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text + "x" * 40_000_000}))
    for count, seqlen in ((3, 16), (1, 2000)):
        short, long, line = (
            data.calibration_windows(
                str(tmp_path / name), tokenizer, samples=count, seqlen=seqlen, seed=0
            ).tokens
            for name in ("short.txt", "long.txt", "long.jsonl")
        )
        assert torch.equal(short, long) and torch.equal(short, line)
    windows = data.evaluation_windows(tmp_path / "long.txt", tokenizer, seqlen=16, windows=4)
    assert windows.tokens.shape == (4, 16)


def test_all_of_an_endless_text_is_not_evaluated(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MOST_WHOLE", 1000)
    (tmp_path / "a.txt").write_text("a " * 600)
    with pytest.raises(DataError, match="--windows"):
        data.evaluation_windows(
            tmp_path / "a.txt", data.load_tokenizer(tiny()), seqlen=8, windows=None
        )


def test_texts_of_the_wrong_kind(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = data.load_tokenizer(tiny())

    def cut(name: str, content: bytes) -> torch.Tensor:
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        return data.calibration_windows(path, tokenizer, samples=1, seqlen=4, seed=0).tokens

    for content in (b"\xff\xfe" * 40, b"ok " * 40 + b"\xc3", b"\xed\xa0\x80" * 40):
        with pytest.raises(DataError, match="not UTF-8"):
            cut("a.txt", content)
        with pytest.raises(DataError, match="not UTF-8"):
            cut("a.jsonl", content)
    assert cut("a.txt", b"\0" * 400).shape == (1, 4)
    for line in (b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b"\0"):
        with pytest.raises(DataError, match="line 2"):
            cut("a.jsonl", b'{"text": "fine"}\n' + line)
    # What JSON allows within a text is no end of a line.
    assert cut("a.jsonl", '{"text": "one\u2028two\x85three"}'.encode()).shape == (1, 4)


# Names and links.


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "\0.safetensors", "..",
             "a" * 300 + ".safetensors", "\x1b[2J.safetensors", "é" * 150 + ".safetensors", ""],
)  # fmt: skip
def test_shards_with_names_of_elsewhere(cli: Cli, tiny: Tiny, tmp_path: Path, name: str) -> None:
    path = copy(tiny(), tmp_path)
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    names = load_file(path / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    one_line(cli("inspect", path), 3)


def test_tensors_with_hostile_names(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny(), tmp_path)
    tensors = load_file(path / "model.safetensors")
    for name in (
        "../../x",
        "\x1b]0;owned\x07\x1b[2J",
        "[/red]",
        "[link=x]a[/link]",
        "a" * 100_000,
        "\0",
    ):
        save_file({**tensors, name: torch.ones(1)}, path / "model.safetensors", {"format": "pt"})
        line = one_line(cli("inspect", path), 3)
        assert "does not belong" in line and line.isprintable() and len(line) < LONGEST + 100
        if name.startswith("["):
            assert name in line


def test_links_of_the_hubs_cache_are_followed(cli: Cli, squeezed: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--tiny"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in squeezed.iterdir():
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    result = cli("convert", snapshot, "-o", tmp_path / "out", "--to", "dense", "-q")
    assert result.exit_code == 0, result.stderr
    made = tmp_path / "out"
    assert (made / "tokenizer.json").read_bytes() == (squeezed / "tokenizer.json").read_bytes()
    assert not any(file.is_symlink() for file in made.iterdir())


def test_weights_may_be_links_but_nothing_else_is_copied_from_elsewhere(
    cli: Cli, tiny: Tiny, tmp_path: Path
) -> None:
    path = copy(tiny(), tmp_path)
    (path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert cli("convert", path, "-o", tmp_path / "a", "--to", "dense", "-q").exit_code == 0
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    for name in ("LICENSE", "tokenizer.model", "NOTICE.txt", "x.jinja"):
        (path / name).symlink_to(secret)
        for command in (["convert", "--to", "dense"], ["prune", "--method", "magnitude"]):
            result = cli(command[0], path, "-o", tmp_path / "out", *command[1:], "-q")
            assert "a link" in one_line(result, 3) and name in result.stderr
            assert not (tmp_path / "out").exists()
        (path / name).unlink()


def test_names_that_are_no_text_or_markup(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        shutil.copytree(tiny(), odd)
    except OSError:
        pass  # a file system of other names
    else:
        assert "UTF-8" in one_line(cli("inspect", odd), 3)
        assert "UTF-8" in json.loads(cli("inspect", odd, "--json").stdout)["error"]
    for name in ("[/red]", "[bold]x\\", "\x1b[2J"):
        path = tmp_path / name
        shutil.copytree(tiny(), path)
        out = path.with_name(path.name + "-out")
        for command in (
            ["convert", path, "-o", out, "--to", "llmsqueeze"],
            ["inspect", path],
            ["inspect", path, "--json"],
        ):
            result = cli(*command)
            assert result.exit_code == 0, result.stderr
            if "--json" in command:
                json.loads(result.stdout)


# Code and weights of others.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attn_implementation": "kernels-community/x"}, "fetch and run code"),
        ({"_attn_implementation": "org/x:f"}, "fetch and run code"),
        ({"experts_implementation": {"": "x"}}, "fetch and run code"),
        ({"transformers_weights": "x.bin"}, "transformers_weights"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_labels": -1}, "num_labels"),
        ({"num_labels": "9"}, "num_labels"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": 10**9}, "shape"),
        ({"vocab_size": 2**40}, "shape"),
        ({"hidden_size": -40}, "no model can be built"),
        ({"pad_token_id": 10**6}, "no model can be built"),
        ({"rms_norm_eps": float("nan")}, "NaN"),
        ({"max_position_embeddings": 10**400}, "64 bits"),
        ({"x": "\ud800"}, "surrogate"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "never runs"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_too_much(
    cli: Cli, tiny: Tiny, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = copy(tiny(), tmp_path, **change)
    assert says in one_line(cli("inspect", path), 3)


def test_tables_beside_the_weights_have_a_limit(tiny: Tiny, tmp_path: Path) -> None:
    """Phi's rotary table is not stored, and as long as config.json says."""
    path = copy(tiny("gpt_neox"), tmp_path, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e8})  # fmt: skip
    with pytest.raises(CheckpointError, match="tables beside the weights"):
        Checkpoint(path)


def test_code_beside_the_weights_is_not_run(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    evil = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", None],
    }
    path = copy(tiny(), tmp_path, auto_map=evil)
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": evil}))
    args = ["--seqlen", 8, "--windows", 1, "--device", "cpu", "-q"]
    cli("eval", path, *args)
    cli("run", path, "a", "--tokens", 2, "--device", "cpu", "-q")
    assert not (tmp_path / "ran").exists()


def test_only_the_weights_that_were_checked_are_loaded(tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny(), tmp_path)
    (path / "model.safetensors").rename(path / "weights.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'id'\ntR.")
    assert entry_name(path) == "weights.safetensors"
    model = runtime.load(Checkpoint(path), torch.float32, torch.device("cpu"))
    weight = load_file(path / "weights.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight.float())
    # The index lists one set, and transformers would take the other.
    names = load_file(path / "weights.safetensors")
    index: dict[str, Any] = {"weight_map": dict.fromkeys(names, "weights.safetensors")}
    file = path / "any.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no metadata"):
        runtime.load(Checkpoint(path), torch.float32, torch.device("cpu"))
    file.write_text(json.dumps(index | {"metadata": {}}))
    assert runtime.load(Checkpoint(path), torch.float32, torch.device("cpu"))
    save_file({n: t + 1 for n, t in names.items()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="keep one of the two"):
        Checkpoint(path)


def test_an_adapter_is_no_checkpoint(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny(), tmp_path)
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    assert "adapter" in one_line(cli("inspect", path), 3)


# Tokenizers and what lies beside.


def test_ids_that_the_embedding_does_not_have(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    path = copy(tiny(), tmp_path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {t: i + 10_000 * (i > 2) for t, i in vocabulary.items()}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    args = ["--device", "cpu", "-q"]
    for command in (
        ["eval", path, "--seqlen", 8, "--windows", 1],
        ["run", path, "abc", "--tokens", 2],
    ):
        assert "do not belong together" in one_line(cli(*command, *args), 3)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ x.y.z }}", "{% for", "{{ raise_exception('no') }}",
                 "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ range(10**9) | list }}", ""],
)  # fmt: skip
def test_chat_templates(cli: Cli, tiny: Tiny, tmp_path: Path, template: str) -> None:
    path = copy(tiny(), tmp_path)
    (path / "chat_template.jinja").write_text(template)
    result = cli("run", path, "abc", "--tokens", 2, "--device", "cpu", "-q")
    assert result.exit_code in (0, 2, 3), result.stderr
    if result.exit_code:
        one_line(result, result.exit_code)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}', '{"cache_implementation": "x"}',
             '{"watermarking_config": {"greenlist_ratio": "a"}}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_generation_configs(cli: Cli, tiny: Tiny, tmp_path: Path, text: str) -> None:
    path = copy(tiny(), tmp_path)
    (path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = cli("run", path, "abc", "--tokens", 2, "--device", "cpu", "-q")
    assert "generation_config.json" in one_line(result, 3)


@pytest.mark.parametrize(
    "head", ["license: 2001-99-99", "license: " + "9" * 5000, "license: " + "[" * 2000, "a: &a [*a]",
             "license: !!python/object/apply:os.system [id]", "license: {a: [1]}", "license: !!bool x",
             "license: \"\\ud800\"", "? [1]\n: 2", "- a"],
)  # fmt: skip
def test_model_cards(cli: Cli, tiny: Tiny, tmp_path: Path, head: str) -> None:
    """What a card says in vain costs nothing: what was made is written all the same."""
    path = copy(tiny(), tmp_path)
    (path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    result = cli("convert", path, "-o", tmp_path / "out", "--to", "llmsqueeze", "-q")
    assert result.exit_code == 0, result.stderr
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert cli("convert", path, "-o", tmp_path / "b", "--to", "llmsqueeze", "-q").exit_code == 0


# Manifests whose hashes fit: whoever made them wanted that.


@pytest.fixture(scope="module")
def squeezed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned, gated and with a quantised cache."""
    from llmsqueeze.step_recipes import parse_steps
    from llmsqueeze.steps import run_steps

    folder = tmp_path_factory.mktemp("hostile")
    (folder / "a.txt").write_text(" ".join(f"line {i} squares to {i * i};" for i in range(220)))
    tokens = {"text": str(folder / "a.txt"), "samples": 4, "seqlen": 24}
    steps = parse_steps(
        {
            "prune": {"method": "magnitude"},
            "sparsify": {"method": "teal", "calibration": tokens},
            "quantize-kv": {"calibration": tokens},
        }
    )
    run_steps(Checkpoint(tiny()), "org/tiny", folder / "out", steps, torch.device("cpu"))
    (folder / "out" / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder / "out"


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "llmsqueeze.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (path / "llmsqueeze.json").write_text(text)
    config = json.loads((path / "config.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    config["quantization_config"]["manifest_sha256"] = digest
    (path / "config.json").write_text(json.dumps(config))


SITE = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(steps=[{}]),
        lambda m: m.update(steps=[1]),
        lambda m: m["steps"][0].pop("source"),
        lambda m: m["steps"][0]["recipe"].pop("target"),
        lambda m: m["steps"][0].update(sparsity="x"),
        lambda m: m["steps"][0]["recipe"]["target"].update(pattern="tile"),
        lambda m: m["steps"][1]["recipe"].update(sparsity=None),
        lambda m: m["steps"][2]["recipe"].pop("bits"),
        lambda m: m.update(bytes_before="1"),
        lambda m: m.update(bytes_after=-1),
        lambda m: m.update(tool_version=3),
        lambda m: m["sites"][SITE].update(nonzeros="1"),
        lambda m: m["sites"][SITE].update(nonzeros=10**9),
        lambda m: m["sites"][SITE].update(bytes_before=None),
        lambda m: m["sites"][SITE].update(report={"a": "b"}),
        lambda m: m["sites"][SITE].update(report=[]),
        lambda m: m["sites"][SITE].update(dtype="int8"),
        lambda m: m["sites"][SITE].update(shape=[True, 1]),
        lambda m: m["sites"].update({"../x": m["sites"][SITE]}),
        lambda m: m["sites"].update({"lm_head.x": {**m["sites"][SITE], "encoding": "dense"}}),
        lambda m: m["shards"]["model.safetensors"].update(bytes="1"),
        lambda m: m["activation"]["file"].update(sha256=1),
        lambda m: m["activation"]["gates"].update({"../x": next(iter(m["activation"]["gates"].values()))}),
        lambda m: m["kv_cache"].update(layers=[0, 99]),
        lambda m: m["kv_cache"].update(heads=3),
        lambda m: m.update(format_version=True),
    ],
)  # fmt: skip
def test_manifests_that_lie(
    cli: Cli, squeezed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = copy(squeezed, tmp_path)
    reseal(path, change)
    for command in (["inspect", path], ["report", path, "-o", tmp_path / "report"]):
        one_line(cli(*command, "-q"), 3)


def test_side_files_of_other_types(cli: Cli, squeezed: Path, tmp_path: Path) -> None:
    from llmsqueeze.shards import hash_file, hash_header

    path = copy(squeezed, tmp_path)
    file = path / "llmsqueeze-kv.safetensors"
    save_file({name: tensor.to(torch.uint8) for name, tensor in load_file(file).items()}, file)

    def change(manifest: dict[str, Any]) -> None:
        manifest["kv_cache"]["file"] = {
            "bytes": file.stat().st_size, "sha256": hash_file(file), "header_sha256": hash_header(file),
        }  # fmt: skip

    reseal(path, change)
    assert "is U8" in one_line(cli("inspect", path), 3)


# JSON and YAML.

LIES = [
    '{"a": 1, "a": 2}', "[NaN]", "[1e999]", "[-1e999]", "9" * 5000, "[18446744073709551616]", '"\\ud800"',
    "[" * 65 + "]" * 65, "[" * 100_000, '{"a":' * 100_000, "", "{'a': 1}", '{"a": 01}', "\ufeff{}",
]  # fmt: skip


@pytest.mark.parametrize("text", LIES, ids=range(len(LIES)))
def test_json_is_read_strictly(cli: Cli, tiny: Tiny, tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):
        untrusted.parse_json(text)
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    assert "a.json" in one_line(cli("report", file, "-o", tmp_path / "r"), 3)
    assert "a.json" in one_line(cli("eval", tiny(), "--baseline", file, "-q"), 3)
    assert "a.json" in one_line(cli("recipe", "validate", file), 2)


def test_json_that_is_fine() -> None:
    for text, value in (
        ("18446744073709551615", 2**64 - 1), ("-9223372036854775808", -(2**63)), ("1e-400", 0.0),
        ('"\\ud83d\\ude00"', "\U0001f600"), ("[" * 64 + "]" * 64, None), ('"\\\\ud800"', "\\ud800"),
    ):  # fmt: skip
        found = untrusted.parse_json(text)
        assert value is None or found == value
    assert untrusted.parse_json('{"a": 1, "a": 2}', twice=True) == {"a": 2}


def laughs(form: str) -> str:
    """A few hundred bytes that stand for 9^9 values."""
    lines = ["a: &a {k: 1}"]
    for letter, last in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"{letter}: &{letter} " + form.format(", ".join([f"*{last}"] * 9)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        laughs("[{}]"), laughs("{{<<: [{}]}}"), "a: &a [*a]", "a: &a {b: *a}",
        "a: !!python/object/apply:os.system [id]", "a: !!python/name:os.system", "a: !!int x", "a: !!bool 5",
        "a: 2001-99-99", "? [1]\n: 2", "a: " + "9" * 5000, "[" * 100_000, "{" * 100_000, "- " * 3000,
        'a: "\\ud800"', "<<: 5", "a: 1\n---\nb: 2", "a: *b", "\x00", "%YAML 9.9\n---\na: 1",
    ],
)  # fmt: skip
def test_yaml_is_read_strictly(cli: Cli, tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError):
        read_recipe(file)
    assert "a.yaml" in one_line(cli("recipe", "validate", file), 2)
    assert "--set" in one_line(cli("recipe", "show", "--set", f"prune.ignore={text}"), 2)


def test_aliases_of_a_reasonable_size_are_fine(tmp_path: Path) -> None:
    text = "prune: {calibration: &t {samples: 4}}\nsparsify: {calibration: *t}\nx: {<<: *t, samples: 5}"
    (tmp_path / "a.yaml").write_text(text)
    found = read_recipe(tmp_path / "a.yaml")
    assert found["sparsify"] == {"calibration": {"samples": 4}} and found["x"] == {"samples": 5}
    assert parse_yaml("010") == 10 and parse_yaml("2:4") == "2:4"


@pytest.mark.parametrize(
    "change", [{"token_ppl": 1e-320}, {"token_ppl": 0}, {"token_ppl": "1"}, {"tasks": []}, {"passkey": 3},
               {"passkey": {"accuracy": "x"}}, {"size_bytes": "x"}, {"checkpoint": None}],
)  # fmt: skip
def test_baselines(cli: Cli, tiny: Tiny, tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"checkpoint": "a", "token_ppl": 20.0, **change}))
    assert "a.json" in one_line(cli("eval", tiny(), "--baseline", file, "-q"), 3)


@pytest.mark.parametrize(
    "change", [{"speedup": 0}, {"bound": 0}, {"bound": -1.0}, {"speedup": 1e300},
               {"dense": {"ms_per_token": 0, "range": [], "bytes_per_token": 1}}],
)  # fmt: skip
def test_results_that_no_measurement_has(cli: Cli, tmp_path: Path, change: dict[str, Any]) -> None:
    """Found by tests.fuzz: what is divided by, or drawn on a scale of powers of ten."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**model_result(), **change}))
    assert "a.json" in one_line(cli("report", file, "-o", tmp_path / "r"), 3)


@pytest.mark.parametrize("command", [["prune"], {}, None, 1])
def test_steps_without_a_command(cli: Cli, tmp_path: Path, command: Any) -> None:
    """Found by tests.fuzz: a list in its place."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"format_version": 1, "steps": [{"command": command}]}))
    assert "is no step" in one_line(cli("recipe", "validate", file), 2)


# GGUF.


def gguf(*, kv: bytes = b"", pairs: int = 1, count: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, pairs) + kv + rest + bytes(64)


def text_of(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


HEADERS = {
    "no magic": b"GGML" + bytes(60),
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + bytes(64),
    "tensors": gguf(pairs=0, count=2**63),
    "pairs": gguf(pairs=2**63),
    "array": gguf(kv=text_of("a") + struct.pack("<IIQ", 9, 0, 2**63)),
    "array of texts": gguf(kv=text_of("a") + struct.pack("<IIQ", 9, 8, 2**63)),
    "array of arrays": gguf(kv=text_of("a") + struct.pack("<IIQ", 9, 9, 2**40)),
    "text": gguf(kv=text_of("a") + struct.pack("<IQ", 8, 2**64 - 1)),
    "name": gguf(kv=struct.pack("<Q", 2**40)),
    "type": gguf(kv=text_of("a") + struct.pack("<I", 77)),
    "twice": gguf(kv=(text_of("a") + struct.pack("<IB", 0, 1)) * 2, pairs=2),
    "not UTF-8": gguf(kv=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)),
    "alignment": gguf(kv=text_of("general.alignment") + struct.pack("<II", 4, 0)),
    "dimensions": gguf(pairs=0, count=1, rest=text_of("a") + struct.pack("<I", 2**31)),
    "overflow": gguf(pairs=0, count=1, rest=text_of("a") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0)),
    "outside": gguf(pairs=0, count=1, rest=text_of("a") + struct.pack("<IQIQ", 1, 4, 0, 2**50)),
    "overlap": gguf(pairs=0, count=2, rest=b"".join(
        text_of(n) + struct.pack("<IQIQ", 1, 4, 0, 0) for n in "ab")),
    "no such type": gguf(pairs=0, count=1, rest=text_of("a") + struct.pack("<IQIQ", 1, 4, 999, 0)),
    "size": gguf(kv=text_of("llama.block_count") + struct.pack("<II", 4, 10**9)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_gguf_headers(cli: Cli, tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(HEADERS[name])
    with pytest.raises(ValueError):
        read_gguf(file)
    assert "a.gguf" in one_line(cli("inspect", file, "--cache-dir", tmp_path / "c", "-q"), 3)
    assert not (tmp_path / "c").exists()


def test_gguf_of_the_other_byte_order_and_of_every_length(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    tiny_gguf(file)
    whole = file.read_bytes()
    _, found = read_gguf(file)
    assert len(found) == 20 and found["output_norm.weight"].extents == (32,)
    for size in range(0, len(whole) - 1, 997):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            read_gguf(file)
    swapped = b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + struct.pack(">Q", 1) + b"a"
    file.write_bytes(swapped + struct.pack(">IQIQ", 1, 4, 0, 0) + bytes(64))
    assert read_gguf(file)[1]["a"].extents == (4,)


@pytest.mark.parametrize(
    "name", [b"llama.block_count", b"blk.1.ffn_up.weight", b"blk.0.", b"output_norm"]
)
def test_gguf_models_are_whole(cli: Cli, tmp_path: Path, name: bytes) -> None:
    """Found by tests.fuzz: what is not said is the library's own, and what is not there is random."""
    file = tmp_path / "a.gguf"
    tiny_gguf(file)
    content = file.read_bytes()
    assert name in content
    file.write_bytes(content.replace(name, name.replace(b"l", b"x").replace(b"n", b"x")))
    assert "a.gguf" in one_line(cli("inspect", file, "--cache-dir", tmp_path / "c", "-q"), 3)
    if name == b"llama.block_count":
        with pytest.raises(ValueError, match="says nothing of"):
            check_model(*read_gguf(file))


@pytest.mark.filterwarnings("ignore")
def test_what_lies_beside_a_gguf_is_no_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file)
    for name in (
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "adapter_config.json",
    ):
        (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "x": [')
    located = source.locate(str(file), offline=True, cache=tmp_path / "cache")
    assert Checkpoint(located.path).dtype == torch.float32


# What we keep ourselves.


def test_damaged_scores_are_measured_again(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path, {"a": 1})
    counted = iter(range(100))

    def measure() -> dict[str, Any]:
        return {"t": {"acc": next(counted)}}

    assert cache.get("t", {"t": "x"}, measure) == {"t": {"acc": 0}}
    assert cache.get("t", {"t": "x"}, measure) == {"t": {"acc": 0}}
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    for damage in (
        text.replace('"acc": 0', '"acc": 1'),
        text[:-5],
        "",
        "[" * 100_000,
        '{"key": 1}',
        "NaN",
    ):
        file.write_text(damage)
        known = cache.get("t", {"t": "x"}, measure)["t"]["acc"]
        assert known > 0 and cache.get("t", {"t": "x"}, measure)["t"]["acc"] == known
        file.write_text(text)


def test_damaged_kernels_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_cubin(name: str, macros: cuda.Macros, arch: str) -> bytes:
        compiled.append(name)
        return b"code"

    monkeypatch.setattr(cuda, "compiler", lambda: "none")
    monkeypatch.setattr(cuda, "compile_cubin", compile_cubin)
    monkeypatch.setenv("LLMSQUEEZE_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        assert cuda.cubin("gaps", {}, "sm_90") == b"code"
    assert len(compiled) == 1
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    for number, damage in enumerate((b"", whole[:-1], b"\0" + whole[1:], b"code"), 2):
        file.write_bytes(damage)
        assert cuda.cubin("gaps", {}, "sm_90") == b"code" and len(compiled) == number


def test_encodings_of_other_types() -> None:
    """Found by tests.fuzz: magnitudes that are integers."""
    from llmsqueeze.encodings import ENCODINGS

    parts = ENCODINGS["int8"].encode(torch.randn(4, 8).bfloat16())
    parts["largest"] = parts["largest"].to(torch.int8)
    for read in (ENCODINGS["int8"].check, ENCODINGS["int8"].decode):
        with pytest.raises(ValueError, match="magnitudes"):
            read(parts, 8)


def test_the_clock_of_these_tests_rings() -> None:
    with pytest.raises(pytest.fail.Exception):
        signal.setitimer(signal.ITIMER_PROF, 0.05)
        while True:
            time.process_time()
