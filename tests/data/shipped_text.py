"""The shipped text, or the beginning of it where that is enough, which is soon tokenised."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from lightning_smoe.data.splits import CORPUS, SPLITS
from lightning_smoe.data.text import TextDataModule

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "qwen2moe-tiny-8dom"
CHARACTERS = 16000


@cache
def short_text() -> Path:
    """A folder with the beginning of every file, not to be changed by tests."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for split in SPLITS:
        (folder / split).mkdir()
        for path in (CORPUS / split).glob("*.txt"):
            # As bytes, so that line ends stay what they are.
            text = path.read_bytes().decode()[:CHARACTERS]
            (folder / split / path.name).write_bytes(text.encode())
    return folder


def shipped(**options: Any) -> TextDataModule:
    """The data module on that text, with small budgets."""
    small: dict[str, Any] = {
        "path": short_text(),
        "sequence_length": 32,
        "calib_tokens": 1024,
        "test_tokens": 512,
        "valid_tokens": 256,
    }
    small |= {"tokenizer": CHECKPOINT} | options
    return TextDataModule(**small)
