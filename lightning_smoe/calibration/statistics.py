"""Sums over calibration tokens: added up by batch, reduced over processes once, kept in a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.calibration.sample import field_names, gathered
from lightning_smoe.errors import InputError
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.functional.sums import MAXIMA, ExpertSums
from lightning_smoe.models.artifact import Manifest, replacing, sha256_of_tensors
from lightning_smoe.models.layer import MoELayer
from lightning_smoe.models.progress import Reduce

_HEADER = "statistics"
_SAMPLE = "sample."
# Numbers that are widened in one go: 2 MB in float64, which stay in the caches and need no new
# memory from the system each time.
_FEW_NUMBERS = 1 << 18
_HASH = "sha256"


def empty_sums(layer: MoELayer, num_domains: int, device: torch.device) -> ExpertSums:
    """Zeros for one layer.

    Args:
        layer: The layer, which gives the number of experts and the width.
        num_domains: Domains, on the first axis of every sum.
        device: Where the sums are kept.
    """
    experts, hidden = layer.num_experts, layer.hidden_size

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(num_domains, *shape, dtype=dtype, device=device)

    return ExpertSums(
        num_tokens=zeros(dtype=torch.int64),
        count=zeros(experts, dtype=torch.int64),
        gate_sum=zeros(experts),
        output_norm_sum=zeros(experts),
        gated_norm_sum=zeros(experts),
        output_energy_sum=zeros(experts),
        gated_energy_sum=zeros(experts),
        output_sum=zeros(experts, hidden),
        output_max=zeros(experts),
        logit_gram=zeros(experts, experts),
    )


def add_routed(sums: ExpertSums, tokens: RoutedTokens) -> None:
    """Adds what the selected experts did, in place; one row of `sums` a domain."""
    if tokens.outputs is None:
        raise ValueError("the sums need the selected experts' outputs; observe with outputs")
    num_domains, num_experts = sums.count.shape
    slot = (tokens.domain[:, None] * num_experts + tokens.expert_indices).reshape(-1)

    def by_expert(values: Tensor) -> Tensor:
        flat = torch.zeros(sums.count.numel(), dtype=torch.float64, device=values.device)
        return flat.index_add_(0, slot, values.double().reshape(-1)).view_as(sums.count)

    gates = tokens.routing_weights.double()
    norms, largest = _add_outputs(sums, slot, tokens.outputs.flatten(0, 1))
    norms = norms.view_as(gates)
    sums.num_tokens.add_(torch.bincount(tokens.domain, minlength=num_domains))
    sums.count.add_(torch.bincount(slot, minlength=sums.count.numel()).view_as(sums.count))
    sums.gate_sum.add_(by_expert(gates))
    sums.output_norm_sum.add_(by_expert(norms))
    sums.gated_norm_sum.add_(by_expert(gates * norms))
    sums.output_energy_sum.add_(by_expert(norms.square()))
    sums.gated_energy_sum.add_(by_expert((gates * norms).square()))
    sums.output_max.view(-1).scatter_reduce_(0, slot, largest, "amax")
    for domain in tokens.domain.unique().tolist():
        logits = tokens.router_logits[tokens.domain == domain].double()
        sums.logit_gram[domain].addmm_(logits.T, logits)


def _add_outputs(
    sums: ExpertSums, slot: Int[Tensor, " routed"], outputs: Float[Tensor, "routed hidden"]
) -> tuple[Float64[Tensor, " routed"], Float64[Tensor, " routed"]]:
    """Adds outputs to their sum, in place.

    Returns:
        Norm and largest absolute number of each output.
    """
    totals = sums.output_sum.flatten(0, 1)
    size = max(1, _FEW_NUMBERS // outputs.shape[1])
    norms, largest = [], []
    for part, place in zip(outputs.split(size), slot.split(size), strict=True):
        wide = part.double()
        totals.index_add_(0, place, wide)
        norms.append(torch.linalg.vector_norm(wide, dim=-1))
        largest.append(wide.abs().amax(-1))
    return torch.cat(norms), torch.cat(largest)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sums of every layer of a model.

    Args:
        layers: Sums by the layer's name; the first axis of each is the domain.
        samples: A sample of the tokens by the layer's name, the same tokens for every layer.
        domains: Names of the domains.
        manifest: What made them.
    """

    layers: dict[str, ExpertSums]
    samples: dict[str, TokenSample]
    domains: tuple[str, ...]
    manifest: Manifest

    def reduced(self, rank: int, reduce: Reduce) -> "Statistics":
        """Adds up the sums, and joins the samples, of all processes.

        Args:
            rank: Number of this process.
            reduce: Sum or maximum of a tensor over processes, as its second argument says.
        """

        def over_processes(name: str, tensor: Tensor) -> Tensor:
            return reduce(tensor, "max" if name in MAXIMA else "sum")

        layers = {
            name: ExpertSums(**{k: over_processes(k, t) for k, t in sums.tensors().items()})
            for name, sums in self.layers.items()
        }
        samples = {name: gathered(sample, rank, reduce) for name, sample in self.samples.items()}
        return Statistics(layers, samples, self.domains, self.manifest)

    def save(self, path: Path) -> None:
        """Writes one safetensors file; manifest, domains and a hash of all stand in its header."""
        tensors = {
            f"{name}:{key}": tensor.cpu().contiguous()
            for name, sums in self.layers.items()
            for key, tensor in sums.tensors().items()
        }
        for name, sample in self.samples.items():
            named = {key: getattr(sample, key) for key in field_names()}
            # Experts are few: their numbers fit into half the bytes.
            named["expert_indices"] = named["expert_indices"].int()
            tensors |= {f"{name}:{_SAMPLE}{k}": t.cpu().contiguous() for k, t in named.items()}
        header: dict[str, Any] = {"manifest": self.manifest.to_json(), "domains": self.domains}
        header[_HASH] = sha256_of_tensors(tensors, header)
        with replacing(path) as partial:
            # One entry: safetensors writes several in an order that differs from run to run.
            save_file(tensors, partial, metadata={_HEADER: json.dumps(header)})

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Reads what `save` wrote.

        Raises:
            InputError: The file is damaged, or is not one of ours.
        """
        manifest, domains = read_header(path)
        tensors = _read_tensors(path)
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, field = key.rpartition(":")
            layers.setdefault(name, {})[field] = tensor
        sums, samples = {}, {}
        try:
            for name, found in sorted(layers.items(), key=_by_layer):
                sample = {k.removeprefix(_SAMPLE): t for k, t in found.items() if _SAMPLE in k}
                sample["expert_indices"] = sample["expert_indices"].long()
                samples[name] = TokenSample(**sample)
                sums[name] = ExpertSums(**{k: t for k, t in found.items() if _SAMPLE not in k})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds other sums than this version reads; delete it and calibrate again"
            ) from error
        return Statistics(sums, samples, domains, manifest)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads every tensor, and compares them and the header with the hash that was noted."""
    header = _read_stored(path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    noted = header.pop(_HASH, None)
    if noted is not None and noted != sha256_of_tensors(tensors, header):
        raise InputError(
            f"{path} is not as it was written: its hash is another; run calibrate again with "
            "model.overwrite=true"
        )
    return tensors


def _by_layer(item: tuple[str, Any]) -> list[Any]:
    return [(len(part), part) for part in item[0].split(".")]


def read_header(path: Path) -> tuple[Manifest, tuple[str, ...]]:
    """Reads what made a statistics file, and its domains, without its tensors.

    Raises:
        InputError: The file is damaged, or is not one of ours.
    """
    stored = _read_stored(path)
    try:
        manifest = Manifest.from_json(stored.get("manifest"))
        domains = tuple(stored.get("domains", ()))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and calibrate again") from error
    if manifest is None:
        raise InputError(f"{path} holds no statistics; delete it and calibrate again")
    return manifest, domains


def _read_stored(path: Path) -> dict[str, Any]:
    """The project's own entry of the header."""
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            return dict(stored)
    except (OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and calibrate again") from error


def domain_of_positions(domain: Int[Tensor, " batch"], sequence: int) -> Int[Tensor, " positions"]:
    """Repeats each sequence's domain for its positions."""
    return domain.repeat_interleave(sequence)
