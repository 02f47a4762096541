"""A checkpoint fetched from the Hugging Face hub."""

from pathlib import Path

from lightning_smoe.errors import InputError


def fetch(name: str) -> Path:
    """Fetches a checkpoint into the usual cache, or finds it there; returns its folder.

    Args:
        name: `organisation/name`.

    Raises:
        InputError: The hub does not give it, and it is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
        # Sub-folders hold the weights a second time, in other formats.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"there is no folder {name}, and the Hugging Face hub did not give {name}: "
            f"{str(error).splitlines()[0]}"
        ) from error
