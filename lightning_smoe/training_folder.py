"""The folder of a training that may be cut off: whose it is, and from where one goes on."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, differences, write_json

logger = logging.getLogger(__name__)

# Another model, text or teacher would give other numbers for the same weights.
_FIXED = ("compressed", "validation text", "dtype")

# What layers learned, each by itself.
STAGE = "layerwise.safetensors"


class TrainingFolder:
    """Checkpoints of one training, and what it was made from.

    Args:
        path: The folder.
        wanted: What the training is made from.
    """

    def __init__(self, path: Path, wanted: Manifest) -> None:
        self.path, self._wanted = path, wanted
        self.last, self.stage = path / "last.ckpt", path / STAGE
        self._origin = path / "manifest.json"

    def find(self, goes_on: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from; none starts at the beginning.

        Args:
            goes_on: Go on from the newest also where settings were others.
            overwrite: Start afresh, unless it is to go on.

        Raises:
            InputError: Another training was cut off here, which would be lost, or to go on with it
                would compare what cannot be compared.
        """
        is_there = self.last.exists()
        if (is_there or self.stage.exists()) and not self._is_ours():
            if goes_on and is_there:
                self._refuse_incomparable()
            elif not overwrite:
                self._refuse_other()
        if is_there and (goes_on or not overwrite):
            logger.info("fit: training goes on from %s", self.last)
            return self.last
        if goes_on:
            logger.info(
                "fit: there is no %s to continue; training starts at the beginning", self.last
            )
        return None

    def prepare(self, resume: Path | None, overwrite: bool) -> None:
        """Makes the folder this training's; takes away what another left, or is to be replaced."""
        if resume is None and (overwrite or not self._is_ours()):
            shutil.rmtree(self.path, ignore_errors=True)
        write_json(self._origin, self._wanted.to_json())

    def _made_from(self) -> Manifest | None:
        is_there = self._origin.exists()
        return Manifest.from_json(json.loads(self._origin.read_text()) if is_there else None)

    def _is_ours(self) -> bool:
        found = self._made_from()
        return found is not None and found.digest == self._wanted.digest

    def _inputs(self) -> dict[str, Any]:
        found = self._made_from()
        return {} if found is None else found.inputs

    def _refuse_other(self) -> None:
        changed = ", ".join(differences(self._inputs(), self._wanted.inputs))
        raise InputError(
            f"{self.path} holds a training with other settings that was cut off (different: "
            f"{changed}); go on with it by --ckpt_path last, or start afresh by --model.overwrite "
            "true"
        )

    def _refuse_incomparable(self) -> None:
        there, here = self._inputs(), self._wanted.inputs
        changed = [name for name in _FIXED if there.get(name) != here[name]]
        before, now = _fixed_settings(there), _fixed_settings(here)
        changed += [name for name in now if before.get(name) != now[name]]
        if changed:
            raise InputError(
                f"{self.path} holds a training of another {', '.join(changed)}, from which this "
                "one cannot go on; set it as it was, or start afresh by --model.overwrite true "
                "without --ckpt_path"
            )


def _fixed_settings(inputs: dict[str, Any]) -> dict[str, Any]:
    """Settings of a recovery that may not change within a training."""
    settings = inputs.get("recovery", {}).get("init_args", {})
    teacher = settings.get("teacher", {}).get("init_args", {})
    return {"lora": settings.get("lora"), "teacher.cache": teacher.get("cache")}
