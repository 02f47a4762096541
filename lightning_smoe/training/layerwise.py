"""Training each layer by itself against what the teacher's layer gives, one layer on the device."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.data.choice import keyed_generator
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.placement import brought
from lightning_smoe.models.walk import WaitingBatch, decoder_layers, embed, run_layer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layerwise:
    """How each layer is trained before all are trained together.

    A layer reads the hidden states that the student's earlier layers, trained already, really give,
    and learns to give the teacher's hidden states behind it. No gradient crosses layers. The result
    is kept only if it lowers the KL on the validation text.

    Args:
        tokens: Training tokens that each layer learns from, at least one sequence.
        passes: How often it sees them, at least 1.
        learning_rate: Peak step size of Adam, above 0; falls to zero over the layer's steps.
    """

    tokens: int = 131072
    passes: int = 2
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.passes < 1 or not self.learning_rate > 0:
            raise ValueError("tokens, passes and learning_rate of layerwise must be above 0")


class LayerwiseModule(LightningModule):
    """Trains a student's layers one after the other under the predict loop, on training text.

    The loop takes every batch up to the first decoder layer, in main memory. Then each layer goes
    to the device in its turn, with one batch at a time.

    Args:
        student: The compressed model; of what requires a gradient, what lies in decoder layers with
            experts is trained, in place.
        teacher: The original.
        options: How long, and how fast.
        seed: Seed of the order of batches.
    """

    _student: PreTrainedModel
    _teacher: PreTrainedModel

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, options: Layerwise, seed: int = 0
    ) -> None:
        super().__init__()
        # Not sub-modules: Lightning would move them whole to the device.
        object.__setattr__(self, "_student", student)
        object.__setattr__(self, "_teacher", teacher)
        self._options = options
        self._seed = seed
        self._pairs: list[tuple[WaitingBatch, WaitingBatch]] = []

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Embeds one batch by both models, and lets it wait."""
        with torch.inference_mode(False):
            here = {name: tensor.cpu().clone() for name, tensor in batch.items()}
            is_token = here["attention_mask"].bool() & here["valid"][:, None]
            ours = embed(self._student, here, is_token)
            self._pairs.append((ours, embed(self._teacher, here, is_token)))
        return {}

    def on_predict_epoch_end(self) -> None:
        """Trains one decoder layer after the other."""
        # What is made in inference mode could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            self._walk()
        self._pairs = []

    def _walk(self) -> None:
        # The teacher's: adapters may be wrapped around the student's.
        indices = [layer.index for layer in find_moe_layers(self._teacher)]
        students, teachers = decoder_layers(self._student), decoder_layers(self._teacher)
        start = time.monotonic()
        for index in range(max(indices) + 1):
            with brought(teachers[index], self.device):
                wanted = [self._run(teachers[index], batch, index) for _, batch in self._pairs]
            student = students[index].to(self.device)
            parameters = [p for p in student.parameters() if p.requires_grad]
            if index in indices and parameters:
                first, last = self._train(student, parameters, index, wanted)
                self._log_layer(indices, index, f"{first:.4f} -> {last:.4f}", start)
            found = [self._run(student, batch, index) for batch, _ in self._pairs]
            student.cpu()
            self._pairs = [
                (ours.moved(a), theirs.moved(b))
                for (ours, theirs), a, b in zip(self._pairs, found, wanted, strict=True)
            ]

    def _run(self, layer: nn.Module, batch: WaitingBatch, index: int) -> Tensor:
        with self.trainer.strategy.precision_plugin.forward_context():
            return run_layer(layer, self._on_device(batch, index), index).to(batch.states)

    def _on_device(self, batch: WaitingBatch, index: int) -> WaitingBatch:
        """A batch with what one layer is called with; nothing for the layers before it."""
        call = move_data_to_device(batch.calls[index], self.device)
        calls = [((), {})] * index + [call]
        is_token = batch.is_token.to(self.device)
        return WaitingBatch(batch.states.to(self.device), calls, is_token, batch.held_out)

    def _train(
        self, layer: nn.Module, parameters: list[nn.Parameter], index: int, wanted: Sequence[Tensor]
    ) -> tuple[float, float]:
        """Trains one layer; returns the mean relative error over its first and last pass."""
        rate = self._options.learning_rate
        optimizer = torch.optim.Adam(parameters, lr=rate)
        orders = list(self._orders(index))
        scale = self._mean_square(wanted)
        num_steps = sum(map(len, orders))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
        errors = []
        for order in orders:
            total = 0.0
            for number in order:
                loss = partial(self._error, layer, index, self._pairs[number][0], wanted[number])
                error = self._step(loss, parameters)
                total += error / scale
                optimizer.step()
                schedule.step()
            errors.append(total / len(order))
        optimizer.zero_grad()
        return errors[0], errors[-1]

    def _orders(self, index: int) -> Iterator[list[int]]:
        for turn in range(self._options.passes):
            # Equal on all processes, though each has batches of its own.
            generator = keyed_generator("layerwise", self._seed, index, turn)
            yield torch.randperm(len(self._pairs), generator=generator).tolist()

    def _error(
        self,
        layer: nn.Module,
        index: int,
        batch: WaitingBatch,
        wanted: Float[Tensor, "batch sequence hidden"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Squared error of a batch, summed over tokens and hidden units; how many numbers that is.

        A sum: gradients of a mean are too small for float16.
        """
        moved = self._on_device(batch, index)
        args, kwargs = moved.calls[index]
        output = layer(moved.states, *args, **kwargs)
        found = output[0] if isinstance(output, tuple) else output
        mask = moved.is_token
        error = (found.float() - wanted.to(self.device).float())[mask].square().sum()
        return error, (mask.sum() * found.shape[-1]).to(error)

    def _step(
        self, loss: Callable[[], tuple[Tensor, Tensor]], parameters: list[nn.Parameter]
    ) -> float:
        """Leaves the gradient of the mean over the tokens of all processes, and returns it."""
        with torch.enable_grad(), self.trainer.strategy.precision_plugin.forward_context():
            error, count = loss()
        gradients = torch.autograd.grad(error, parameters, materialize_grads=True)
        flat = [torch.stack([error.detach(), count]), *(g.float().reshape(-1) for g in gradients)]
        reduced = self.trainer.strategy.reduce(torch.cat(flat), reduce_op="sum")
        total, tokens = reduced[0], reduced[1].clamp_min(1)
        pieces = reduced[2:].split([p.numel() for p in parameters])
        for parameter, gradient in zip(parameters, pieces, strict=True):
            parameter.grad = (gradient / tokens).view_as(parameter).to(parameter)
        return float(total / tokens)

    def _mean_square(self, states: Sequence[Tensor]) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for (batch, _), state in zip(self._pairs, states, strict=True):
            chosen = state[batch.is_token].double()
            sums += torch.stack([chosen.square().sum(), chosen.new_tensor(chosen.numel())]).to(sums)
        total: Tensor = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return float(total[0] / total[1])

    def _log_layer(self, indices: list[int], index: int, error: str, start: float) -> None:
        done = sum(i <= index for i in indices)
        left = (time.monotonic() - start) / done * (len(indices) - done)
        if self.global_rank == 0:
            logger.info(
                "fit: layer %d trained by itself, relative error %s; %d of %d layers, %.0f s left",
                index, error, done, len(indices), left,
            )  # fmt: skip
