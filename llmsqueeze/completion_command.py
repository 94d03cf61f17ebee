"""`llmsqueeze completion`: the script by which a shell completes commands, options and choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import click.shell_completion

from llmsqueeze.command import light

if TYPE_CHECKING:
    from llmsqueeze.console import Console

PROGRAM = "llmsqueeze"
VARIABLE = "_LLMSQUEEZE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@light
def completion(console: Console, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options and choices.

    \b
    bash: llmsqueeze completion bash > ~/.local/share/bash-completion/completions/llmsqueeze
    zsh:  llmsqueeze completion zsh > DIR/_llmsqueeze, with DIR in fpath
    fish: llmsqueeze completion fish > ~/.config/fish/completions/llmsqueeze.fish
    """
    kind = click.shell_completion.get_completion_class(shell)
    assert kind is not None
    # Not source(): bash's first starts bash, to look at its version.
    made = kind(click.Group(PROGRAM), {}, PROGRAM, VARIABLE)
    script = made.source_template % made.source_vars()
    console.stream(script.strip() + "\n")
    console.result({"shell": shell, "script": script})
