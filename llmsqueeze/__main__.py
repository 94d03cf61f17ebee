"""``python -m llmsqueeze``."""

from llmsqueeze.cli import main

main()
