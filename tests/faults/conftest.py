"""The places of the command line's tests, to break things in."""

from tests.cli.conftest import new_workplace, text, work

__all__ = ["new_workplace", "text", "work"]
