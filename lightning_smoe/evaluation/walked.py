"""What a compressed model kept, with one decoder layer of one model in memory at a time."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_smoe.evaluation.perplexity import DomainSums, Quality
from lightning_smoe.models.residence import Residence
from lightning_smoe.models.walk import embed, finish, run_layer

logger = logging.getLogger(__name__)

Batches = Sequence[Mapping[str, Tensor]]


class WalkedEvaluation(LightningModule):
    """Compares a model with its teacher under the test loop, both read from their files.

    The loop collects the text; then each decoder layer runs on all of it. The final hidden states
    of all tokens are kept, and the heads turn them into logits a piece at a time.

    Args:
        model: The model to judge.
        teacher: The original; the same object when it is judged alone.
        domains: Names of the domains, by number.
        teacher_states: The teacher's final hidden states of each batch; none while not known.

    Attributes:
        quality: What was found.
        teacher_states: The teacher's final hidden states, for the next model.
    """

    _residences: tuple[Residence, Residence]

    def __init__(
        self,
        model: Residence,
        teacher: Residence,
        domains: tuple[str, ...],
        teacher_states: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        # Not sub-modules: Lightning would move weights that are not there.
        object.__setattr__(self, "_residences", (model, teacher))
        self._domains = domains
        self.teacher_states = teacher_states
        self._batches: list[dict[str, Tensor]] = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Lets a batch wait."""
        self._batches.append(batch)

    def on_test_epoch_end(self) -> None:
        """Takes all text through both models, and adds up all processes.

        Raises:
            InputError: A domain has no token to predict.
        """
        model, teacher = self._residences
        if self.teacher_states is None:
            self.teacher_states = self._states_of(teacher, "original")
        found = self.teacher_states if model is teacher else self._states_of(model, "model")
        sums = DomainSums(self._domains, self.device)
        with ExitStack() as stack:
            for residence in dict.fromkeys((teacher, model)):
                stack.enter_context(residence.outside(self.device, "head"))
            for batch, wanted, states in zip(
                self._batches, self.teacher_states, found, strict=True
            ):
                with self.trainer.strategy.precision_plugin.forward_context():
                    sums.add(batch, (teacher.model, wanted), (model.model, states))
        self.quality: Quality = sums.quality(self.trainer.strategy)
        self._batches = []

    def _states_of(
        self, residence: Residence, name: str
    ) -> list[Float[Tensor, "batch sequence hidden"]]:
        """Final hidden states of each batch."""
        numbers = self.trainer.strategy.precision_plugin.forward_context
        with residence.outside(self.device, "inputs"), numbers():
            waiting = [
                embed(residence.model, batch, batch["attention_mask"].bool())
                for batch in self._batches
            ]
        start, total = time.monotonic(), residence.num_layers
        for index in range(total):
            with residence.layer(index, self.device) as decoder, numbers():
                waiting = [batch.moved(run_layer(decoder, batch, index)) for batch in waiting]
            left = (time.monotonic() - start) / (index + 1) * (total - index - 1)
            if self.global_rank == 0:
                logger.info(
                    "evaluate: %s, decoder layer %d; %d of %d, %.0f s left",
                    name, index, index + 1, total, left,
                )  # fmt: skip
        with residence.outside(self.device, "inputs"), numbers():
            pairs = zip(self._batches, waiting, strict=True)
            return [finish(residence.model, batch, w.states) for batch, w in pairs]
