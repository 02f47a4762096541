"""The training text as epochs of whole optimizer steps."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_smoe.data.mixing import Mixture
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.data.samplers import EpochSampler, ResumableLoader, WindowDataset
from lightning_smoe.errors import InputError


@dataclass(frozen=True, eq=False)
class Epochs:
    """Goes through the training text again and again.

    Args:
        windows: The training text.
        weights: Weight of each domain; none takes every window once.
        batch_size: Sequences of a batch.
        seed: Seed of the order.
    """

    windows: TokenWindows
    weights: Mapping[str, float] | None
    batch_size: int
    seed: int

    def check(self, num_processes: int, num_accumulated: int) -> None:
        """Checks that an epoch has a sequence for each place of one optimizer step.

        Args:
            num_processes: Processes that share the text.
            num_accumulated: Batches whose gradients make one step.

        Raises:
            InputError: It has fewer, or none of a domain that has a weight.
        """
        found, needed = len(self.windows), self.batch_size * num_processes * num_accumulated
        if found < needed:
            less = " or trainer.accumulate_grad_batches" if num_accumulated > 1 else ""
            raise InputError(
                f"the train split gives {found} sequences but one step takes {needed} -> give "
                f"more text or a larger data.train_tokens, or a smaller data.batch_size{less}"
            )
        if self._mixture is not None:
            self._mixture.check(found // needed * needed, self.windows.domain_names)

    def loader(
        self, replicas: Mapping[str, int], num_accumulated: int, num_workers: int
    ) -> ResumableLoader:
        """Loads the share of one process.

        Args:
            replicas: `num_replicas` and `rank` of the process.
            num_accumulated: Batches whose gradients make one step.
            num_workers: Processes that load batches.

        Raises:
            InputError: As in `check`.
        """
        self.check(replicas["num_replicas"], num_accumulated)
        dataset = WindowDataset(self.windows)
        sampler = EpochSampler(
            dataset,
            **replicas,
            seed=self.seed,
            samples_a_step=self.batch_size * num_accumulated,
            mixture=self._mixture,
        )
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            drop_last=True,
        )

    @property
    def _mixture(self) -> Mixture | None:
        if self.weights is None:
            return None
        weights = tuple(self.weights[name] for name in self.windows.domain_names)
        return Mixture(self.windows.domain, weights)
