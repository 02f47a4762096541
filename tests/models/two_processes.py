"""The training of a tiny student on one process, or on two that are forked for it."""

import copy
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.functional.chunked import chunked
from lightning_smoe.models.head import final_states, head_parameters, logits_of
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.sharding import shard
from lightning_smoe.models.walk import decoder_layers
from tests.families import VOCAB_SIZE, build

# Two batches of four are an epoch.
SEQUENCES = torch.randint(3, VOCAB_SIZE, (8, 12), generator=torch.Generator().manual_seed(3))
CHUNK_SIZE = 7


@dataclass(frozen=True)
class Run:
    """How a student is trained; the global batch is four sequences whatever the strategy.

    Args:
        strategy: One process, or two that each hold the student whole (ddp) or a slice of it.
        parts: What is trained of every layer; `all` is every parameter of the model.
    """

    folder: Path
    strategy: Literal["one", "ddp", "slices"] = "one"
    parts: Sequence[Literal["router", "experts", "all"]] = ("router",)
    family: str = "qwen2_moe"
    is_tied: bool = False
    is_checkpointed: bool = False
    shards_teacher: bool = False
    accumulate: int = 1
    clip: float | None = None
    max_steps: int = 3
    resume: Path | None = None


@torch.no_grad()
def gathered_state(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Whole parameters in the main memory of the first process, nothing on the others.

    To be called on all processes; one parameter at a time is on the devices.

    Args:
        model: A model, sharded or not, between two steps.
        names: Parameters that are wanted.
    """
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name in names:
        whole: Any = parameters[name]
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if is_first:
            # A copy: on the CPU a tensor that never was in slices is the parameter itself.
            state[name] = whole.detach().to("cpu", copy=True)
    return state


class Distillation(LightningModule):
    """What a module has to do so that its student and its teacher may be in slices."""

    _teacher: PreTrainedModel

    def __init__(self, run: Run) -> None:
        super().__init__()
        teacher = build(run.family).requires_grad_(False)
        if run.is_tied:
            embedding: Any = teacher.get_input_embeddings()
            teacher.get_output_embeddings().weight = embedding.weight
        object.__setattr__(self, "_teacher", teacher)
        self._run = run
        self.student = copy.deepcopy(teacher)
        for layer in find_moe_layers(self.student):
            layer.select(torch.arange(8))
            for part in run.parts:
                for parameter in [] if part == "all" else layer.parameters_of(part):
                    parameter.requires_grad_(True)
        if "all" in run.parts:
            self.student.requires_grad_(True)
        if run.is_checkpointed:
            self.student.activation_checkpointing_enable({"use_reentrant": False})
            # Only reentrant checkpoints need inputs with gradients, which reach down to layer 0.
            self.student.disable_input_require_grads()
            for decoder_layer in decoder_layers(self.student):
                # This flag alone, not its children's: routers may draw noise in training.
                decoder_layer.training = True
        self.strict_loading = False
        self.register_state_dict_post_hook(keep_trainable)  # type: ignore[no-untyped-call]  # torch
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.counts: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.student, self.device_mesh["data_parallel"])
        if self._run.shards_teacher:
            shard(self._teacher, init_device_mesh("cpu", (self.trainer.world_size,)))

    def configure_optimizers(self) -> Any:
        named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        experts = {"params": [p for n, p in named if "experts" in n], "lr": 3e-4}
        others = {"params": [p for n, p in named if "experts" not in n], "lr": 1e-3}
        optimizer = torch.optim.AdamW([g for g in (experts, others) if g["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _loss(self, ids: Tensor) -> Tensor:
        """KL to the teacher chunk by chunk, and a penalty on what is inside the layers."""
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits: list[Tensor] = []
        layers = find_moe_layers(self.student)
        hooks = [layer.router.register_forward_hook(recorder(layer, logits)) for layer in layers]
        with torch.no_grad():
            wanted = final_states(self._teacher, batch).flatten(0, 1)
        states = final_states(self.student, batch).flatten(0, 1)
        for hook in hooks:
            hook.remove()

        def loss(some: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher = log_softmax(logits_of(self._teacher, wanted[rows]), -1)
            student = log_softmax(logits_of(self.student, some), -1)
            value = kl_div(student, teacher, reduction="sum", log_target=True)
            return value, value.detach().double()[None]

        total, _ = chunked(loss, states, head_parameters(self.student), CHUNK_SIZE)
        return total / len(states) + 1e-4 * sum(x.square().mean() for x in logits)

    def _mean(self, loss: Tensor) -> float:
        reduced: Any = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        return float(reduced)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch[0])
        self.losses.append(self._mean(loss))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.held_out.append(self._mean(self._loss(batch[0])))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        is_token = torch.ones(batch[0].numel(), dtype=torch.bool)
        ran = Batch(is_token, torch.zeros(batch[0].numel(), dtype=torch.int64))
        with observing(find_moe_layers(self.student), lambda: ran, self._count, with_outputs=True):
            self.held_out.append(self._mean(self._loss(batch[0])))

    def _count(self, layer: MoELayer, tokens: RoutedTokens) -> None:
        count = torch.bincount(tokens.expert_indices.flatten(), minlength=layer.num_experts)
        reduced: Any = self.trainer.strategy.reduce(count, reduce_op="sum")
        self.counts[layer.name] = self.counts.get(layer.name, 0) + reduced


def keep_trainable(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Leaves in a state what is trained; nothing else is gathered for a checkpoint then."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for name in state.keys() - trained:
        del state[name]


def recorder(layer: MoELayer, found: list[Tensor]) -> Any:
    """A hook that keeps a router's logits."""
    return lambda _, __, output: found.append(layer.router_logits(output))


def train(run: Run) -> dict[str, Any]:
    """Validates, trains, validates and tests; gives what is seen and the whole student."""
    count = 1 if run.strategy == "one" else 2
    slices: Any = ModelParallelStrategy(
        data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=count,
        strategy={"one": "auto", "ddp": "ddp", "slices": slices}[run.strategy],
        max_steps=run.max_steps,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=run.clip,
        callbacks=[ModelCheckpoint(run.folder, "{step}", every_n_train_steps=2, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    module = Distillation(run)
    dataset = TensorDataset(SEQUENCES)
    sampler: Any = DistributedSampler(dataset, count, int(os.environ.get("LOCAL_RANK", "0")), False)
    text = DataLoader(dataset, 4 // count, sampler=sampler)
    # Leaves the head whole on every process, which training must not mistake for the slices.
    trainer.validate(module, text, verbose=False)
    trainer.fit(module, text, text, ckpt_path=run.resume)
    trainer.test(module, text, verbose=False)
    # Takes back what the test left whole.
    module.configure_model()
    weights = gathered_state(module.student, [n for n, _ in module.student.named_parameters()])
    return {
        "losses": module.losses,
        "held_out": module.held_out,
        "counts": module.counts,
        "weights": weights,
    }


def _work(rank: int, port: int, run: Run, target: Path) -> None:
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "NODE_RANK": 0}
    os.environ.update({k: str(v) for k, v in (names | {"LOCAL_RANK": rank, "RANK": rank}).items()})
    result = train(run)
    if rank == 0:
        torch.save(result, target)
    torch.distributed.destroy_process_group()


def trained(run: Run) -> dict[str, Any]:
    """What a run gives; on two processes if its strategy asks for them."""
    if run.strategy == "one":
        return train(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    target = run.folder / "result.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_work, (port, run, target), nprocs=2, start_method="fork")
    result: dict[str, Any] = torch.load(target)
    return result
