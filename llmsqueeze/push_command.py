"""`llmsqueeze push`: a checkpoint, with a complete model card, to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import common, offline_option
from llmsqueeze.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console


@click.command(
    help="""Upload the checkpoint OUT, which llmsqueeze made, to REPO (ORG/NAME) on the Hugging Face hub.

Nothing else in llmsqueeze uploads anything. Every shard is hashed first. Only files of the checkpoint go
out: weights, config.json, llmsqueeze.json, tokenizer, licence, README.md; what is left out is said. They are
one commit, so that nobody sees half of it. A repository that is not there yet is made, private unless
--public.

README.md is written anew, with what --results measured, unless somebody changed the one in OUT: that is
uploaded as it is. A card that somebody wrote on the hub is only touched with --replace-card.

Log in with `hf auth login`, or set HF_TOKEN to a token that may write. Without that, with no network, or when
the hub refuses, the exit code is 4 and nothing is published.
"""
)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--results", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="For the card: what `eval` or `bench model` printed with --json of OUT. "
              "Repeatable.")  # fmt: skip
@click.option("--private/--public", default=None,
              help="Who sees a repository that is made; one that is there stays as it is."
              "  [default: private]")  # fmt: skip
@click.option("--revision", default="main", show_default=True, metavar="BRANCH",
              help="Branch to commit to; made from the main one if it is not there.")  # fmt: skip
@click.option("--message", metavar="TEXT", help="Of the commit.  [default: what was uploaded]")
@click.option("--base-model", metavar="ORG/NAME",
              help="The model it was made from, on the hub.  [default: the hub id that was "
              "compressed]")  # fmt: skip
@click.option("--license", "licence", metavar="ID",
              help="Licence, under the hub's name for it.  [default: the source's]")  # fmt: skip
@click.option("--language", multiple=True, metavar="CODE",
              help="Language, as in en. Repeatable.  [default: the source's]")  # fmt: skip
@click.option("--keep-card", is_flag=True, help="Leave the README.md of REPO alone.")
@click.option("--replace-card", is_flag=True,
              help="Replace the README.md of REPO though somebody wrote it.")  # fmt: skip
@click.option("--overwrite", is_flag=True,
              help="Replace a checkpoint at REPO that llmsqueeze did not make.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="Say which files would go out, print the card, and do not touch the network.")  # fmt: skip
@offline_option
@common
def push(
    console: Console,
    out: Path,
    repo: str,
    results: tuple[Path, ...],
    private: bool | None,
    revision: str,
    message: str | None,
    base_model: str | None,
    licence: str | None,
    language: tuple[str, ...],
    keep_card: bool,
    replace_card: bool,
    overwrite: bool,
    dry_run: bool,
    offline: bool,
) -> None:
    if offline and not dry_run:
        raise RecipeError("push needs the network, which --offline forbids; --dry-run does not")
    for option, name in (("REPO", repo), ("--base-model", base_model)):
        if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise RecipeError(f"{option} {name}: write it as ORG/NAME")
    if keep_card and (replace_card or results or base_model or licence or language):
        raise RecipeError("--keep-card leaves the card alone: nothing can be written into it")
    if not out.is_dir():
        raise CheckpointError(f"{out} is no directory; push uploads a checkpoint from this machine")

    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import size
    from llmsqueeze.push import CARD_NAME, Hub, check_card, check_place, paths_within, select

    opened = Checkpoint(out)
    hub = None if dry_run else Hub(repo)
    upload = select(opened)
    given: dict[str, Any] = {}
    if base_model:
        given |= {"base_model": base_model, "base_model_relation": "quantized"}
    if licence:
        given["license"] = licence
    if language:
        given["language"] = list(language)
    card = _card(opened, repo, results, given)
    check_card(card)
    for name, reason in upload.left_out.items():
        console.note(f"left out: {name} ({reason})")
    if opened.manifest and (paths := paths_within({"steps": opened.manifest.steps})):
        console.note(
            f"warning: llmsqueeze.json names {', '.join(paths)}, which others will read there"
        )
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    document: dict[str, Any] = {
        "repo": repo, "revision": revision, "dry_run": dry_run, "url": None, "commit": None,
        "created": None, "private": None, "deleted": [], "left_out": upload.left_out,
    }  # fmt: skip
    rows: dict[str, str] = {}
    new: str | None = None if keep_card else card
    if hub:
        place = hub.find(revision)
        new = check_place(
            place, upload, card, private=private, overwrite=overwrite, keep_card=keep_card,
            replace_card=replace_card,
        )  # fmt: skip
        created = place.head is None
        hidden = (private is not False) if created else place.private
        console.note(f"uploading {len(sizes)} files, {size(sum(sizes.values()))}, to {repo}")
        done = hub.publish(
            place, upload, new, private=hidden,
            message=message or f"Upload a checkpoint made by llmsqueeze ({out.resolve().name})",
        )  # fmt: skip
        document |= {
            "url": done.url, "commit": done.commit, "created": created, "private": hidden,
            "deleted": done.deleted,
        }  # fmt: skip
        rows |= {
            "at": done.url,
            "commit": done.commit or "none: everything is there already",
            "repository": f"{'private' if hidden else 'public'}{', new' if created else ''}",
        }
        if done.deleted:
            rows["deleted there"] = ", ".join(done.deleted)
    if new is not None:
        sizes[CARD_NAME] = len(new.encode("utf-8"))
    document |= {
        "files": [{"name": name, "bytes": count} for name, count in sizes.items()],
        "bytes": sum(sizes.values()),
        "card": new,
    }
    rows |= {name: size(count) for name, count in sizes.items()}
    rows["in all"] = size(sum(sizes.values()))
    _show(console, document, f"{repo}{', dry run' if dry_run else ''}", rows, new)


def _card(opened: Checkpoint, repo: str, results: tuple[Path, ...], given: dict[str, Any]) -> str:
    """The README.md of OUT if somebody changed it, else a new one that says all that is known."""
    from llmsqueeze.card import INHERITED, is_sealed, read_front_matter
    from llmsqueeze.hub_card import hub_card
    from llmsqueeze.push import CARD_NAME
    from llmsqueeze.report.document import build, read_result

    path = opened.path / CARD_NAME
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if before and not is_sealed(before):
        if results or given:
            raise RecipeError(
                f"{path} was changed by hand and is uploaded as it is, so --results, --base-model, --license "
                "and --language have no place; move it away to have one written"
            )
        return before
    known = read_front_matter(before)
    keys = ("base_model", "base_model_relation", *INHERITED)
    origin = {key: known[key] for key in keys if key in known} | given
    report = build([(opened, repo)], [read_result(file) for file in results])
    return hub_card(repo, report, origin)


def _show(
    console: Console, document: dict[str, Any], title: str, rows: dict[str, str], card: str | None
) -> None:
    from llmsqueeze.console import facts

    console.result(document, facts(title, rows))
    if document["dry_run"] and card is not None:
        console.stream(card)
