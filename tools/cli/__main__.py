"""``python -m bitlower.tools.cli``: the command ``bitlower``."""

from bitlower.tools.cli import command

command()
