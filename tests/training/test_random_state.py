"""Generators after a resume."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.training.checkpoint_io import AtomicCheckpointIO
from lightning_smoe.training.keeping import LastCheckpoint
from lightning_smoe.training.random_state import RandomState, read_generators, write_generators
from tests.training.line import Line, line_trainer

CPU = torch.device("cpu")


def drawn() -> list[float]:
    normal = [random.gauss(0, 1), np.random.standard_normal(), torch.randn(()).item()]
    return [*normal, random.random(), np.random.random(), torch.rand(()).item()]


def test_every_generator_goes_on_where_it_was_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    # A normal number more than a pair leaves half a pair in the generator.
    drawn()
    torch.save(read_generators(CPU), tmp_path / "states.pt")
    expected = drawn(), drawn()
    write_generators(torch.load(tmp_path / "states.pt", weights_only=True), CPU)
    assert (drawn(), drawn()) == expected


def test_noise_goes_on_after_a_resume(tmp_path: Path) -> None:
    keeping = [RandomState(), LastCheckpoint(tmp_path, 1)]
    torch.manual_seed(1)
    whole = Line()
    line_trainer(6, tmp_path, callbacks=[RandomState(), LastCheckpoint(tmp_path / "w")]).fit(whole)
    torch.manual_seed(1)
    line_trainer(3, tmp_path, callbacks=keeping).fit(Line())
    torch.manual_seed(77)
    second = Line()
    again = line_trainer(6, tmp_path, callbacks=[RandomState(), LastCheckpoint(tmp_path, 1)])
    again.fit(second, ckpt_path=tmp_path / "last.ckpt")
    assert len(set(whole.noise)) == 6
    assert second.noise == whole.noise[3:]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    line_trainer(2, tmp_path, callbacks=[RandomState(), LastCheckpoint(tmp_path)]).fit(Line())
    files = AtomicCheckpointIO()
    checkpoint = files.load_checkpoint(path)
    checkpoint["random_state"] *= 2
    files.save_checkpoint(checkpoint, path)
    again = line_trainer(4, tmp_path, callbacks=[RandomState(), LastCheckpoint(tmp_path)])
    with pytest.raises(InputError, match=r"by 2 processes and this run has 1; .*num_nodes = 2"):
        again.fit(Line(), ckpt_path=path)
    del checkpoint["random_state"]
    files.save_checkpoint(checkpoint, path)
    with pytest.raises(InputError, match="no states of random generators"):
        again.fit(Line(), ckpt_path=path)
