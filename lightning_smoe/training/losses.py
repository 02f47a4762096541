"""The loss of a batch: weighted objectives on tokens and on layers, each also by itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions, flat_positions, next_tokens
from lightning_smoe.errors import InputError
from lightning_smoe.functional.chunked import chunk_size_of, chunked
from lightning_smoe.models.head import final_states, head_parameters, logits_of, vocab_size_of
from lightning_smoe.models.layer import MoELayer
from lightning_smoe.training.layer_objectives import LayerObjective, LayerPair
from lightning_smoe.training.objective_names import distinct_names
from lightning_smoe.training.objectives import TokenObjective
from lightning_smoe.training.position_values import values_of
from lightning_smoe.training.signals import LayerRecorder, LayerSignals, Signal
from lightning_smoe.training.teacher import Teacher, TeacherAnswer

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """What a batch gives.

    Args:
        total: Weighted sum of the objectives, summed over counted tokens; with gradients.
        sums: Each objective by its name, without its weight, summed over counted tokens.
        num_tokens: Counted tokens.
    """

    total: Float[Tensor, ""]
    sums: dict[str, Float64[Tensor, ""]]
    num_tokens: int


def no_others(tensor: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return tensor


class Losses:
    """Takes the losses of a student's batches; every mean is a sum over the number of tokens.

    Args:
        student: The compressed model.
        layers: Its mixture-of-experts layers, found before any was wrapped (LoRA).
        objectives: What it is trained for.
        assignments: By the name of a layer, the student's expert in the place of each of the
            teacher's, -1 where there is none.
        reduce: Sums a tensor over all processes.

    Raises:
        InputError: There is no objective, or one is to be taken at a layer that has not what it
            takes.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        layers: Sequence[MoELayer],
        objectives: Sequence[TokenObjective | LayerObjective],
        assignments: Mapping[str, Int[Tensor, " experts"]] | None = None,
        *,
        reduce: Callable[[Tensor], Tensor] = no_others,
    ) -> None:
        if not objectives:
            raise InputError("there is no objective; name one, such as ForwardKL")
        self._student, self._reduce = student, reduce
        self._token_objectives = [o for o in objectives if isinstance(o, TokenObjective)]
        self._layer_objectives = [o for o in objectives if isinstance(o, LayerObjective)]
        # Kept on the CPU, where looking at them waits for nothing.
        self._assignments = {name: groups.cpu() for name, groups in (assignments or {}).items()}
        wanted = {signal for o in self._layer_objectives for signal in o.signals}
        self._recorder = LayerRecorder(student, layers, wanted)
        for objective in self._layer_objectives:
            self._check(objective)
        self._chunk_size = chunk_size_of(vocab_size_of(student))

    def _check(self, objective: LayerObjective) -> None:
        """Checks that an objective can be taken at the layers that it names."""
        known = self._recorder.available(objective.signals)
        named = list(known) if objective.layers == "all" else objective.layers
        for index in named:
            if index not in known:
                raise InputError(
                    f"{objective.name} is to be taken at decoder layer {index}, which does not "
                    f"have what it takes; those that do are {list(known)}"
                )
            if objective.needs_assignment and known[index] not in self._assignments:
                raise InputError(
                    f"{objective.name} has to know where the experts of {known[index]} went; "
                    "compress with this program, or take the objective away"
                )
        if not named:
            raise InputError(f"{objective.name} names no layer; name some, or all")

    @cached_property
    def names(self) -> list[str]:
        """Names of all objectives, those on tokens first; ones of the same kind are numbered."""
        names = [objective.name for objective in self._token_objectives]
        return distinct_names(names + [objective.name for objective in self._layer_objectives])

    @cached_property
    def needs_teacher(self) -> bool:
        """Whether any objective compares with the teacher."""
        return bool(self.temperatures) or bool(self.teacher_signals)

    @cached_property
    def temperatures(self) -> frozenset[float]:
        """What the teacher's logits are divided by."""
        return frozenset(o.temperature for o in self._token_objectives if o.needs_teacher)

    @cached_property
    def teacher_signals(self) -> frozenset[Signal]:
        """What has to be recorded of the teacher's layers."""
        asking = [o for o in self._layer_objectives if o.needs_teacher]
        return frozenset(signal for objective in asking for signal in objective.signals)

    def __call__(self, teacher: Teacher, batch: Batch, split: str = "train") -> BatchLoss:
        """The losses of a batch of a split; the teacher is asked only if it has to be."""
        counted = counted_positions(batch)
        positions = flat_positions(counted)
        answer = self._ask(teacher, batch, counted, split)
        with self._recorder.recording(counted) as signals:
            states = final_states(self._student, batch)
        # Even if no objective is on tokens, gradients have to come from the end of the model: a
        # model that is shared out makes its layers whole on their way (FSDP2, DDP).
        totals: list[Tensor] = [0.0 * states.flatten()[0]]
        if not self._token_objectives:
            totals += [0.0 * p.flatten()[0] for p in head_parameters(self._student)]
        sums: list[Tensor] = []
        states = states.flatten(0, 1).index_select(0, positions)
        if self._token_objectives:
            targets = next_tokens(batch, positions)
            total, token_sums = self._of_tokens(states, answer, targets)
            totals.append(total)
            sums.extend(token_sums.unbind())
        taught = answer.signals if answer is not None and answer.signals is not None else {}
        for objective, values in self._of_layers(signals, taught):
            totals.append(objective.weight * values.sum())
            sums.append(values.detach().double().sum())
        named = dict(zip(self.names, sums, strict=True))
        return BatchLoss(torch.stack(totals).sum(), named, len(positions))

    def _ask(
        self, teacher: Teacher, batch: Batch, counted: Bool[Tensor, "batch sequence"], split: str
    ) -> TeacherAnswer | None:
        if not self.needs_teacher:
            return None
        return teacher.answer(batch, counted, split, bool(self.teacher_signals))

    def _of_tokens(
        self,
        states: Float[Tensor, "tokens hidden"],
        answer: TeacherAnswer | None,
        targets: Int64[Tensor, " tokens"],
    ) -> tuple[Float[Tensor, ""], Float64[Tensor, " objectives"]]:
        def loss(piece: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            logits = logits_of(self._student, piece)
            values = values_of(self._token_objectives, logits, answer, (rows, targets))
            summed = [
                o.weight * v.sum() for o, v in zip(self._token_objectives, values, strict=True)
            ]
            return torch.stack(summed).sum(), values.detach().double().sum(1)

        return chunked(loss, states, head_parameters(self._student), self._chunk_size)

    def _of_layers(
        self, student: Mapping[str, LayerSignals], teacher: Mapping[str, LayerSignals]
    ) -> list[tuple[LayerObjective, Float[Tensor, " tokens"]]]:
        """Each objective's mean over its layers, at each counted position."""
        pairs = []
        for name, signals in self._over_processes(student).items():
            taught = teacher.get(name, LayerSignals(signals.facts, {}))
            pairs.append(LayerPair(signals, taught, self._assignments.get(name)))
        found = []
        for objective in self._layer_objectives:
            chosen = [pair for pair in pairs if objective.concerns(pair.student)]
            found.append((objective, torch.stack([objective(pair) for pair in chosen]).mean(0)))
        return found

    def _over_processes(self, signals: Mapping[str, LayerSignals]) -> dict[str, LayerSignals]:
        """The same signals, counts of experts summed over processes, all in one message."""
        counts = [s["expert_counts"] for s in signals.values() if "expert_counts" in s.recorded]
        if not counts:
            return dict(signals)
        summed = iter(self._reduce(torch.cat(counts)).split([len(c) for c in counts]))
        return {
            name: replace(s, recorded={**s.recorded, "expert_counts": next(summed)})
            if "expert_counts" in s.recorded
            else s
            for name, s in signals.items()
        }
