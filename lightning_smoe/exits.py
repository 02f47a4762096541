"""How the program ends: exit codes and one message for what a person can put right."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError

from lightning_smoe.errors import InputError


@contextmanager
def exiting_on_bad_input() -> Iterator[None]:
    """Ends the program with code 2 on bad input or a full disk, and 130 on an interrupt."""
    try:
        yield
    except InputError as error:
        _exit(str(error))
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interrupt within a loop into an exit.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        _exit("interrupted; the same command goes on from there, unless it overwrites", 130)
    except (OSError, SafetensorError) as error:
        # The error of safetensors has no number, only the text.
        full = os.strerror(errno.ENOSPC) in str(error)
        if not full and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        _exit(f"no space is left on the disk: {error}; free some, or name another model.output_dir")


def _exit(message: str, code: int = 2) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
