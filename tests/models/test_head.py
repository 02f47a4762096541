"""A model cut in front of its head gives the logits of the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.head import check_isolates, final_states, head_parameters, logits_of
from tests.families import build


def padded(tokens: Tensor) -> dict[str, Tensor]:
    """The second row ends early."""
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def isolated(tokens: Tensor) -> dict[str, Tensor]:
    """Each row holds a document of seven tokens and one of nine."""
    positions = torch.cat([torch.arange(7), torch.arange(9)]).expand_as(tokens)
    return {**padded(tokens), "position_ids": positions}


def from_halves(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits by way of the final states."""
    return torch.stack([logits_of(model, row) for row in final_states(model, batch)])


@torch.no_grad()
def test_both_halves_give_the_logits_of_the_whole(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    batch = padded(tokens)
    wanted = tiny_moe(**batch, use_cache=False).logits
    torch.testing.assert_close(from_halves(tiny_moe, batch), wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_documents_of_a_window_do_not_see_each_other_or_are_refused(
    family: str, tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    if family == "gpt_oss":
        with pytest.raises(InputError, match=r"a gpt_oss lets documents .* see each other; give"):
            check_isolates(tiny_moe)
        return
    check_isolates(tiny_moe)
    found = from_halves(tiny_moe, isolated(tokens))
    for piece in (slice(0, 7), slice(7, 16)):
        alone = tiny_moe(tokens[:, piece], use_cache=False).logits
        torch.testing.assert_close(found[:, piece], alone, rtol=1e-4, atol=1e-5)


def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    """Gradient of each parameter that has one, under a loss that no symmetry makes zero."""
    model.zero_grad()
    logits.float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe", "deepseek_v3"])
def test_gradients_are_those_of_the_whole_model(
    name: str, checkpointing: bool, tokens: Tensor
) -> None:
    model = build(name).train()
    batch = padded(tokens)
    wanted = gradients(model, model(**batch, use_cache=False).logits)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, from_halves(model, batch))
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-7)


def test_the_head_alone_is_run_and_the_model_left_as_it_was(tokens: Tensor) -> None:
    model = build("granitemoe")
    before = dict(model.__dict__), dict(model._modules)
    ran: list[Any] = []
    model.base_model.register_forward_hook(lambda *_: ran.append(_))
    logits = logits_of(model, torch.randn(5, 32))
    assert logits.shape == (5, 256)
    assert not ran
    assert (dict(model.__dict__), dict(model._modules)) == before


def test_an_embedding_tied_to_the_head_is_among_its_parameters() -> None:
    model = build("qwen3_moe")
    assert [id(p) for p in head_parameters(model)] == [id(model.lm_head.weight)]
    model.lm_head.weight = model.get_input_embeddings().weight
    assert [id(p) for p in head_parameters(model)] == [id(model.model.embed_tokens.weight)]
    model.requires_grad_(False)
    assert head_parameters(model) == []
