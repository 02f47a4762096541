"""How the program ends: exit codes and one message for what a person can put right."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError

from lightning_smoe.errors import InputError

# A file system, a quota or a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    errno.EACCES,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


@contextmanager
def exiting_on_bad_input() -> Iterator[None]:
    """Ends the program with code 2 on bad input or a disk that refuses, and 130 on an interrupt."""
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
        number = _number_of(error)
        if number in _FULL:
            advice = "free some, or name another model.output_dir"
            _exit(f"no space is left on the disk: {error}; {advice}")
        if number not in _REFUSED:
            raise
        _exit(f"the disk refuses: {error}; change what is there, or name another place")


def _number_of(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error."""
    number: int | None = getattr(error, "errno", None)
    if number is not None:
        return number
    # Errors of safetensors have only the text.
    return next((n for n in (*_FULL, *_REFUSED) if f"(os error {n})" in str(error)), None)


def _exit(message: str, code: int = 2) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
