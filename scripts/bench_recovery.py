"""What recovery costs beside a bare PyTorch loop, in time, and beside both models, in memory."""

import copy
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.options import Recovery
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.teacher import LiveTeacher
from lightning_smoe.training.trainable import find_trained, hold_trainable

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "qwen2moe-tiny-8dom"
NUM_STEPS = 8
PARTS = ("router", "experts")


def loops() -> tuple[str, dict[str, Callable[[], None]]]:
    """Training steps of the shipped model at half its experts, by hand and by `fit`."""
    data = TextDataModule(tokenizer=CHECKPOINT, train_tokens=NUM_STEPS * 2048)
    batches = list(data.train_dataloader())
    teacher = load(CHECKPOINT)
    student = halved(teacher)
    candidates = {
        "bare PyTorch loop": lambda: train_bare(copy.deepcopy(student), teacher, batches),
        "fit": lambda: fit(copy.deepcopy(student), teacher, data, Recovery(PARTS)),
    }
    return f"recovery, {NUM_STEPS} steps of 2048 tokens, routers and experts", candidates


def halved(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student that has the first half of its teacher's experts."""
    student = copy.deepcopy(teacher)
    for layer in find_moe_layers(student):
        layer.select(torch.arange(layer.num_experts // 2))
    return student


def train_bare(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> None:
    """The same forward and backward passes without anything around them."""
    hold_trainable(student, find_trained(student, PARTS, 1e-3))
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = log_softmax(teacher(**inputs, use_cache=False).logits[:, :-1], -1)
        found = log_softmax(student(**inputs, use_cache=False).logits[:, :-1], -1)
        loss = kl_div(found, wanted, reduction="sum", log_target=True) / found[..., 0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fit(
    student: PreTrainedModel, teacher: PreTrainedModel, data: TextDataModule, recovery: Recovery
) -> None:
    """Trains as `fit` does, TensorBoard included, but for validations and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=len(data.train_dataloader()),
            max_epochs=-1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(RecoveryModule(student, LiveTeacher(teacher), recovery, Path(folder)), data)


def memory() -> None:
    """Shows the peak of router-only training above student and teacher, on a random model."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=768,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=384,
    )
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    student = halved(teacher)
    weights = sum(p.numel() * p.element_size() for m in (teacher, student) for p in m.parameters())
    data = TextDataModule(tokenizer=CHECKPOINT, train_tokens=2048, batch_size=4)
    data.windows("train")
    table = Table(
        "training",
        "MB above both models",
        "of both models",
        title=f"memory, both models {weights / 1e6:.0f} MB, 1024 tokens a batch",
    )
    settings = {
        "routers, gradient checkpointing": Recovery(gradient_checkpointing=True),
        "routers": Recovery(),
        "routers and experts": Recovery(PARTS),
    }
    before = start_peak()
    for name, recovery in settings.items():
        start_peak()
        fit(student, teacher, data, recovery)
        extra = peak() - before
        table.add_row(name, f"{extra / 1e6:.0f}", f"{extra / weights:.0%}")
    Console().print(table)


def start_peak() -> int:
    """Forgets the peak of this process so far; returns the memory that it takes, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most memory that this process took, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("/proc/self/status says nothing of memory; this benchmark needs Linux")
    return int(found.group(1)) * 1024
