"""`push` against a stand-in for the hub that the real client talks to; see hub.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

from llmsqueeze.card import is_sealed, read_front_matter
from tests.hub import TOKEN, Hub, serving

Cli = Callable[..., Any]
Tiny = Callable[..., Path]

REPO = "org/tiny-50"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub; whoever runs the tests is not logged in to another."""
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + template)
        yield made


@pytest.fixture(scope="module")
def made(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that everything was done to, of a source whose card says what it is."""
    folder = tmp_path_factory.mktemp("made")
    source = shutil.copytree(tiny(), folder / "source")
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en, fr]\ntags: [x]\n---\n# Tiny\n"
    )
    (source / "LICENSE").write_text("Do as you like.")
    calibration = {"text": str(text_file), "samples": 4, "seqlen": 24}
    recipe = {
        "prune": {"method": "wanda", "calibration": calibration},
        "sparsify": {"sparsity": 0.4, "calibration": calibration},
        "quantize-kv": {"method": "rotate", "bits": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["compress", source, "-o", folder / "out", "--recipe", folder / "recipe.yaml",
               "--device", "cpu", "-q"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "llmsqueeze", *map(str, command)], check=True)
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to do anything to."""
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def evaluated(cli: Cli, made: Path, text_file: Path, tmp_path: Path) -> Path:
    """What eval says of it, with a task and the dense model beside it."""
    items = tmp_path / "sums.jsonl"
    lines = [{"query": f"{i} + {i} =", "choices": [f" {2 * i}", " 1"], "gold": 0} for i in range(6)]
    items.write_text("\n".join(map(json.dumps, lines)))
    result = cli("eval", made, "--against", made.parent / "source", "--text", text_file, "--seqlen", 24,
                 "--windows", 3, "--tasks", items, "--device", "cpu", "-q", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    file = tmp_path / "eval.json"
    file.write_text(result.stdout)
    return file


def document(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: Any, code: int, says: str) -> None:
    assert result.exit_code == code, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert says in last and last.startswith("error:")
    assert "Traceback" not in result.stderr


def test_what_comes_back_is_what_was_there(cli: Cli, hub: Hub, made: Path, tmp_path: Path) -> None:
    done = document(cli("push", made, REPO, "--json", "-q"))
    assert done["created"] and done["private"] and hub.repositories[REPO].private
    assert len(hub.repositories[REPO].commits) == 2  # the hub's own, and ours
    sent = hub.files(REPO)
    assert {name: sent[name] for name in sent if name != "README.md"} == {
        path.name: path.read_bytes() for path in made.iterdir() if path.name != "README.md"
    }
    assert [entry["name"] for entry in done["files"]] == [
        *sorted(set(sent) - {"README.md"}),
        "README.md",
    ]
    assert sent["README.md"].decode() == done["card"]

    fetched = Path(huggingface_hub.snapshot_download(REPO, local_dir=tmp_path / "fetched"))
    from llmsqueeze.checkpoint import Checkpoint

    ours, theirs = Checkpoint(made), Checkpoint(fetched)
    for name in ours.sources:
        a, b = ours.read([name])[name], theirs.read([name])[name]
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name
    verified = document(cli("inspect", fetched, "--verify", "--json"))
    assert verified["verified"]


def test_a_process_of_its_own(hub: Hub, made: Path) -> None:
    """As a user has it: the endpoint and the token from the environment."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "llmsqueeze", "push", str(made), REPO, "--public"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{REPO}" in done.stdout and "public, new" in done.stdout
    assert not hub.repositories[REPO].private
    assert TOKEN not in done.stdout + done.stderr


def test_the_card_is_complete(cli: Cli, hub: Hub, out: Path, evaluated: Path) -> None:
    args = ["--results", evaluated, "--base-model", "org/tiny", "--json", "-q"]
    card = document(cli("push", out, REPO, *args))["card"]
    measured = json.loads(evaluated.read_text())
    head = read_front_matter(card)
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation"
    assert (head["base_model"], head["base_model_relation"]) == ("org/tiny", "quantized")
    assert (head["license"], head["language"]) == ("mit", ["en", "fr"])
    assert {"llmsqueeze", "sparse", "activation-sparsity", "kv-cache"} <= set(head["tags"])
    # The hub's own reader of cards, not ours.
    data = huggingface_hub.ModelCard(card).data
    found = {(r.dataset_name, r.metric_type): r for r in data.eval_results or []}
    perplexity = found["text.txt", "token_ppl"]
    assert perplexity.metric_value == measured["token_ppl"]
    assert perplexity.metric_name == "token_ppl@24"
    assert found["sums", "acc"].metric_value == measured["tasks"]["sums"]["acc"]
    assert set(found) == {("text.txt", "token_ppl"), ("sums", "acc"), ("sums", "acc_norm")}
    assert data.model_name == "tiny-50"
    manifest = json.loads((out / "llmsqueeze.json").read_text())
    for kind in ("q_proj", "down_proj"):
        sites = [s for name, s in manifest["sites"].items() if name.endswith(kind)]
        before, after = (sum(s[f"bytes_{when}"] for s in sites) for when in ("before", "after"))
        zeros = 1 - sites[0]["nonzeros"] / (sites[0]["shape"][0] * sites[0]["shape"][1])
        (line,) = [line for line in card.splitlines() if line.startswith(f"| `{kind}`")]
        assert f"{zeros:.1%}" in line and f"{before / 1000:.1f} kB → {after / 1000:.1f} kB" in line
    assert "llmsqueeze compress org/tiny -o OUT --recipe llmsqueeze.json" in card
    assert f'from_pretrained("{REPO}")' in card and "import llmsqueeze" in card
    assert "word" in card and "word_ppl" not in card
    assert str(out.parent) not in card and "/tmp" not in card  # nothing of this machine
    assert is_sealed(card)


def test_the_recipe_in_the_card_is_one(cli: Cli, made: Path) -> None:
    from llmsqueeze.step_recipes import parse_steps

    card = document(cli("push", made, REPO, "--dry-run", "--json", "-q"))["card"]
    (text,) = [part.partition("```")[0] for part in card.split("```yaml\n")[1:]]
    recipe = yaml.safe_load(text)
    assert [step.command for step in parse_steps(recipe)] == ["prune", "sparsify", "quantize-kv"]
    assert recipe["prune"]["calibration"]["text"] == "text.txt"


def test_a_dry_run_touches_nothing(
    cli: Cli, hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = cli("push", out, REPO, "--dry-run", "--offline")
    assert result.exit_code == 0, result.stderr
    assert "model.safetensors" in result.stdout and "library_name: transformers" in result.stdout
    assert hub.requests == []
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    refused(cli("push", out, REPO, "--offline"), 2, "--dry-run")
    assert hub.requests == []


def test_other_files_stay_here(cli: Cli, hub: Hub, out: Path) -> None:
    secrets = {".env": "KEY=very-secret", "token": TOKEN}
    secrets |= dict.fromkeys(("notes.txt", "model.bin", "tokenizer.pkl", "x.bak"), "very-secret")
    for name, text in secrets.items():
        (out / name).write_text(text)
    (out / ".out.work").mkdir()
    (out / ".out.work" / "state.safetensors").write_text("very-secret")
    (out / "tokenizer_link.json").symlink_to("/nowhere/at/all")
    result = cli("push", out, REPO, "--json")
    done = document(result)
    assert set(done["left_out"]) == {*secrets, ".out.work", "tokenizer_link.json"}
    assert all(f"left out: {name}" in result.stderr for name in done["left_out"])
    assert not set(hub.files(REPO)) & set(done["left_out"])
    assert not any(b"very-secret" in data for data in hub.sent)
    assert not any(TOKEN.encode() in data for data in hub.sent)


def test_links_and_tokens_are_refused(cli: Cli, hub: Hub, out: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text('{"password": "x"}')
    (out / "tokenizer_extra.json").symlink_to(outside)
    refused(cli("push", out, REPO, "-q"), 3, "link to a file elsewhere")
    (out / "tokenizer_extra.json").unlink()
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**config, "token": TOKEN}))
    result = cli("push", out, REPO, "-q")
    refused(result, 3, "access token")
    assert TOKEN not in result.stderr
    assert hub.repositories == {}


def test_damage_is_found_before_anything_is_sent(cli: Cli, hub: Hub, out: Path) -> None:
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(cli("push", out, REPO, "-q"), 3, "contents differ")
    assert hub.requests == []


def test_only_what_llmsqueeze_made(cli: Cli, hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    refused(cli("push", tiny(), REPO, "-q"), 3, "llmsqueeze.json")
    refused(cli("push", tmp_path / "nope", REPO, "-q"), 3, "no directory")
    for name in ("tiny", "a/b/c", "a b/c", "https://x/y"):
        refused(cli("push", tmp_path, name, "-q"), 2, "ORG/NAME")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("at", "status", "says"),
    [
        ("POST /api/repos/create", 401, "token"),
        ("POST /api/repos/create", 403, "write access"),
        ("GET /api/models", 429, "429"),
        ("POST .*/preupload", 403, "write access"),
        ("POST /api/validate-yaml", 400, "Invalid metadata"),
        ("POST .*/objects/batch", 400, "400"),
        ("PUT /lfs", 400, "400"),
        ("PUT /lfs", 503, "503"),
        ("POST .*/commit/", 400, "400"),
        ("POST .*/commit/", 412, "changed meanwhile"),
        ("POST .*/commit/", 503, "503"),
    ],
)
def test_what_fails_publishes_nothing(
    cli: Cli, hub: Hub, made: Path, at: str, status: int, says: str
) -> None:
    headers = {"X-Error-Message": "because it says so"}
    hub.failures[at] = (status, headers, {"error": "x", "errors": [{"message": "a key"}]})
    refused(cli("push", made, REPO, "-q"), 4, says)
    assert not hub.repositories or set(hub.files(REPO)) == set()
    hub.failures.clear()
    assert document(cli("push", made, REPO, "-q", "--json"))["commit"]


def test_nobody_is_logged_in(
    cli: Cli, hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    refused(cli("push", made, REPO, "-q"), 4, "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused(cli("push", made, REPO, "-q"), 4, "hf auth login")
    assert hub.repositories == {}


def test_no_network(cli: Cli, hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(cli("push", made, REPO, "-q"), 4, "cannot be reached")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # which reads that when it is made
    refused(cli("push", made, REPO, "-q"), 4, "cannot be reached")
    monkeypatch.undo()
    huggingface_hub.close_session()


def test_a_file_that_the_hub_ignores_is_noticed(cli: Cli, hub: Hub, made: Path) -> None:
    hub.ignored.add("tokenizer.json")
    refused(cli("push", made, REPO, "-q"), 4, "no tokenizer.json")


def test_other_things_are_not_replaced(cli: Cli, hub: Hub, made: Path) -> None:
    theirs = {"pytorch_model.bin": b"old", "model-00001-of-00002.safetensors": b"old", "plot.png": b"x",
              "data/train.txt": b"y", "LICENSE": b"theirs"}  # fmt: skip
    hub.make(REPO, theirs)
    refused(cli("push", made, REPO, "-q"), 2, "holds other things")
    assert hub.files(REPO) == theirs
    done = document(cli("push", made, REPO, "-q", "--json", "--overwrite"))
    assert done["deleted"] == ["model-00001-of-00002.safetensors", "pytorch_model.bin"]
    left = hub.files(REPO)
    assert left["plot.png"] == b"x" and left["data/train.txt"] == b"y"
    assert left["LICENSE"] == (made / "LICENSE").read_bytes()


def test_a_later_checkpoint_takes_the_place_of_an_earlier(
    cli: Cli, hub: Hub, made: Path, tiny: Tiny, tmp_path: Path
) -> None:
    document(cli("push", made, REPO, "-q", "--json"))
    again = document(cli("push", made, REPO, "-q", "--json"))
    assert again["commit"] is None and not again["created"]
    assert len(hub.repositories[REPO].commits) == 2
    later = tmp_path / "later"
    assert cli("prune", tiny(), "-o", later, "--method", "magnitude", "-q").exit_code == 0
    done = document(cli("push", later, REPO, "-q", "--json", "--message", "Prune by magnitude"))
    assert done["deleted"] == ["llmsqueeze.safetensors"]  # of gates, which it has not
    files = hub.files(REPO)
    assert {name for name in files if name != "LICENSE"} == {path.name for path in later.iterdir()}
    assert hub.repositories[REPO].messages[-1] == "Prune by magnitude"


def test_a_branch(cli: Cli, hub: Hub, made: Path) -> None:
    hub.make(REPO, {"README.md": b"# mine\n"})
    args = ["--revision", "int8", "--replace-card", "-q", "--json"]
    done = document(cli("push", made, REPO, *args))
    assert done["url"].endswith("/tree/int8")
    assert hub.files(REPO) == {"README.md": b"# mine\n"}
    assert "model.safetensors" in hub.files(REPO, "int8")


def test_visibility_is_never_changed_silently(cli: Cli, hub: Hub, made: Path) -> None:
    hub.make(REPO, {}, private=False)
    refused(cli("push", made, REPO, "-q", "--private"), 2, "public already")
    assert document(cli("push", made, REPO, "-q", "--json"))["private"] is False
    hub.make("org/b", {}, private=True)
    refused(cli("push", made, "org/b", "-q", "--public"), 2, "private already")


def test_a_card_on_the_hub_that_somebody_wrote(cli: Cli, hub: Hub, made: Path) -> None:
    document(cli("push", made, REPO, "-q", "--json"))
    repository = hub.repositories[REPO]
    written = hub.files(REPO)["README.md"] + b"\nAnd it likes cats.\n"
    repository.commit("main", {**hub.files(REPO), "README.md": written}, "edit")
    refused(cli("push", made, REPO, "-q"), 2, "--keep-card")
    kept = document(cli("push", made, REPO, "-q", "--json", "--keep-card"))
    assert kept["card"] is None and hub.files(REPO)["README.md"] == written
    document(cli("push", made, REPO, "-q", "--json", "--replace-card"))
    assert is_sealed(hub.files(REPO)["README.md"].decode())
    refused(cli("push", made, "org/new", "-q", "--keep-card"), 2, "no card")
    refused(cli("push", made, REPO, "-q", "--keep-card", "--license", "mit"), 2, "--keep-card")


def test_a_card_here_that_somebody_wrote(cli: Cli, hub: Hub, out: Path, evaluated: Path) -> None:
    (out / "README.md").write_text("# Mine\n\nIt likes cats.\n")
    document(cli("push", out, REPO, "-q", "--json"))
    assert hub.files(REPO)["README.md"] == b"# Mine\n\nIt likes cats.\n"
    document(cli("push", out, REPO, "-q", "--json"))  # the same is no loss
    refused(cli("push", out, REPO, "-q", "--results", evaluated), 2, "by hand")
    (out / "README.md").write_text(f"My token is {TOKEN}.")
    refused(cli("push", out, REPO, "-q", "--replace-card"), 2, "access token")


def test_results_of_something_else(
    cli: Cli, made: Path, tiny: Tiny, evaluated: Path, tmp_path: Path
) -> None:
    other = json.loads(evaluated.read_text())
    file = tmp_path / "other.json"
    file.write_text(json.dumps({**other, "manifest_sha256": "0" * 64}))
    refused(cli("push", made, REPO, "--dry-run", "-q", "--results", file), 3, "another checkpoint")
    file.write_text(json.dumps({"error": "no memory", "exit_code": 5}))
    refused(cli("push", made, REPO, "--dry-run", "-q", "--results", file), 3, "no place")
    file.write_text("{}")
    refused(cli("push", made, REPO, "--dry-run", "-q", "--results", file), 3, "other.json")


def test_paths_of_this_machine_are_said(cli: Cli, made: Path, text_file: Path) -> None:
    result = cli("push", made, REPO, "--dry-run")
    (warning,) = [line for line in result.stderr.splitlines() if "llmsqueeze.json names" in line]
    assert str(made.parent / "source") in warning and str(text_file) in warning


def test_cards_of_steps_say_where_weights_came_from(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    """The base model, once it is known, is that of every checkpoint made from the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli("convert", tiny(), "-o", first, "--to", "llmsqueeze", "-q").exit_code == 0
    card = (first / "README.md").read_text()
    assert is_sealed(card) and not is_sealed(card.replace("converted", "turned"))
    from llmsqueeze.card import front_matter, seal

    head = {**read_front_matter(card), "base_model": "org/tiny", "license": "mit"}
    (first / "README.md").write_text(seal(front_matter(head) + "# tiny\n"))
    assert cli("convert", first, "-o", second, "--to", "dense", "-q").exit_code == 0
    found = read_front_matter((second / "README.md").read_text())
    assert (found["base_model"], found["license"]) == ("org/tiny", "mit")
    dense = document(cli("push", second, REPO, "--dry-run", "--json", "-q"))["card"]
    assert "same size" in dense and "import llmsqueeze" not in dense
