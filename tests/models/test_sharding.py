"""A student or a teacher in slices trains and answers as a whole one does."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.sharding import is_sharded, shard
from tests.families import build
from tests.models.two_processes import Distillation, Run, gathered_state, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
# Sums of float32 gradients over half a batch each, through three steps of Adam.
TOLERANCE = 1e-5

CASES: dict[str, dict[str, Any]] = {
    "routers": {},
    "routers and experts": {
        "family": "deepseek_v3",
        "parts": ["router", "experts"],
        "accumulate": 2,
        "clip": 0.01,
    },
    "checkpointed": {"parts": ["router", "experts"], "is_checkpointed": True},
    "all, tied": {"parts": ["all"], "is_tied": True, "clip": 0.1},
}


@pytest.fixture
def alone(tmp_path: Path) -> DeviceMesh:
    """The only process of a group."""
    init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    return init_device_mesh("cpu", (1,))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["slices", "ddp"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(
    case: str, strategy: Literal["slices", "ddp"], tmp_path: Path
) -> None:
    run = Run(tmp_path / "one", **CASES[case])
    wanted = trained(run)
    found = trained(replace(run, folder=tmp_path / "two", strategy=strategy))
    assert len(wanted["losses"]) == run.max_steps * run.accumulate
    for key in ("losses", "held_out", "weights"):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found["counts"], wanted["counts"], rtol=0, atol=0)
    student = Distillation(run).student
    for name, start in student.named_parameters():
        moved = not torch.equal(found["weights"][name], start)
        assert moved == start.requires_grad, name


@pytest.mark.slow
def test_a_teacher_in_slices_teaches_a_whole_student(tmp_path: Path) -> None:
    run = Run(tmp_path / "whole", "ddp")
    wanted = trained(run)
    found = trained(replace(run, folder=tmp_path / "slices", shards_teacher=True))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.slow
def test_training_in_slices_goes_on_bit_for_bit_from_a_checkpoint_of_what_is_trained(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "through", "slices", ("router", "experts"), max_steps=4)
    wanted = trained(run)
    checkpoint = run.folder / "step=2.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    names = {n for n, p in Distillation(run).named_parameters() if p.requires_grad}
    assert state.keys() == names
    assert all(type(tensor) is Tensor for tensor in state.values())
    found = trained(replace(run, resume=checkpoint))
    assert found["losses"] == wanted["losses"][2:]
    torch.testing.assert_close(found["weights"], wanted["weights"], rtol=0, atol=0)


def test_slices_give_the_same_logits_and_the_same_whole_weights(
    tiny_moe: PreTrainedModel, tokens: Tensor, alone: DeviceMesh
) -> None:
    whole = {name: p.detach().clone() for name, p in tiny_moe.named_parameters()}
    logits = tiny_moe(tokens, use_cache=False).logits
    shard(tiny_moe, alone)
    assert is_sharded(tiny_moe)
    slices = dict(tiny_moe.named_parameters())
    assert slices.keys() == whole.keys()
    assert torch.equal(tiny_moe(tokens, use_cache=False).logits, logits)
    # The pass left the head whole, which sharding anew takes back.
    assert any(p is not slices[name] for name, p in tiny_moe.named_parameters())
    shard(tiny_moe, alone)
    assert all(p is slices[name] for name, p in tiny_moe.named_parameters())
    torch.testing.assert_close(gathered_state(tiny_moe, list(whole)), whole, rtol=0, atol=0)


def test_training_the_head_alone_in_slices_is_refused(alone: DeviceMesh) -> None:
    model = build("qwen3_moe").requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(InputError, match="nothing of a decoder layer"):
        shard(model, alone)


def test_a_gathered_state_is_a_copy() -> None:
    model = build("qwen3_moe")
    name, parameter = next(iter(model.named_parameters()))
    state = gathered_state(model, [name])
    assert state.keys() == {name}
    state[name].zero_()
    assert parameter.abs().sum() > 0
