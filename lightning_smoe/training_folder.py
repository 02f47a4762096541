"""The folder of a training that may be cut off: whose it is, and from where one goes on."""

import json
import logging
import shutil
from pathlib import Path

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, differences, replacing, write_json

logger = logging.getLogger(__name__)


class TrainingFolder:
    """Checkpoints of one training, and what it was made from.

    Args:
        path: The folder.
        wanted: What the training is made from.
    """

    def __init__(self, path: Path, wanted: Manifest) -> None:
        self.path, self._wanted = path, wanted
        self.last = path / "last.ckpt"
        self._origin = path / "manifest.json"

    def find(self, ckpt_path: str | None, overwrite: bool) -> Path | None:
        """The checkpoint to go on from; none starts at the beginning.

        Args:
            ckpt_path: A file, or `last` for the newest here, whatever its settings were; none goes
                on only where the settings were the same.
            overwrite: Start afresh, unless a checkpoint is named.

        Raises:
            InputError: Another training was cut off here, which would be lost.
        """
        if ckpt_path not in (None, "last"):
            return Path(str(ckpt_path))
        if self.last.exists():
            if ckpt_path is None and not overwrite:
                self._refuse_other()
            if ckpt_path == "last" or not overwrite:
                logger.info("fit: training goes on from %s", self.last)
                return self.last
        if ckpt_path == "last":
            logger.info(
                "fit: there is no %s to continue; training starts at the beginning", self.last
            )
        return None

    def prepare(self, resume: Path | None, overwrite: bool) -> None:
        """Makes the folder this training's, with the checkpoint to go on from as the last one."""
        is_here = resume is not None and resume.resolve().parent == self.path.resolve()
        found = self._made_from()
        is_same = found is not None and found.digest == self._wanted.digest and not overwrite
        # What another training left would be taken for this one's.
        if not is_here and (resume is not None or not is_same):
            kept = self.path.with_name(f".{self.path.name}.resumed")
            if resume is not None:
                shutil.copyfile(resume, kept)
            shutil.rmtree(self.path, ignore_errors=True)
            if resume is not None:
                self.path.mkdir(parents=True)
                kept.replace(self.last)
        elif resume is not None and resume.resolve() != self.last.resolve():
            with replacing(self.last) as partial:
                shutil.copyfile(resume, partial)
        write_json(self._origin, self._wanted.to_json())

    def _made_from(self) -> Manifest | None:
        is_there = self._origin.exists()
        return Manifest.from_json(json.loads(self._origin.read_text()) if is_there else None)

    def _refuse_other(self) -> None:
        found = self._made_from()
        if found is not None and found.digest == self._wanted.digest:
            return
        changed = [] if found is None else differences(found.inputs, self._wanted.inputs)
        reason = f" (different: {', '.join(changed)})" if changed else ""
        raise InputError(
            f"{self.path} holds a training with other settings that was cut off{reason}; go on "
            "with it by --ckpt_path last, or start afresh by --model.overwrite true"
        )
