"""What tests of the sampling engine share: requests, references, snapshots of a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from firetitan_daemon.engine.adapter import write_adapter
from firetitan_daemon.engine.api import SavedSnapshot, SnapshotKind, SnapshotLayer
from firetitan_daemon.engine.export import SnapshotWriter
from firetitan_daemon.engine.sample_api import SampleRequest, SampleResult


def random_requests(count: int, seed: int, longest: int = 40) -> list[SampleRequest]:
    """Requests of many shapes: lengths, samples, temperatures, cuts."""
    rng = np.random.default_rng(seed)
    return [
        SampleRequest(
            prompt=rng.integers(0, 256, size=rng.integers(1, longest)).astype(np.int32),
            num_samples=int(rng.integers(1, 8)),
            max_tokens=int(rng.integers(1, 24)),
            seed=int(rng.integers(0, 2**62)),
            temperature=float(rng.choice([0.0, 0.7, 1.0, 1.0])),
            top_k=int(rng.choice([0, 0, 5])),
            top_p=float(rng.choice([0.9, 1.0, 1.0])),
            prompt_logprobs=bool(rng.random() < 0.5),
        )
        for _ in range(count)
    ]


def bits(result: SampleResult) -> tuple[object, ...]:
    """Everything a request and its snapshot decide, to the bit."""
    prompt = None if result.prompt.logprobs is None else result.prompt.logprobs.tobytes()
    return (
        result.snapshot,
        prompt,
        tuple(
            (
                sequence.token_ids.tobytes(),
                sequence.sampling_logprobs.tobytes(),
                sequence.inference_logprobs.tobytes(),
                sequence.stop_reason,
            )
            for sequence in result.sequences
        ),
    )


def plain_logprobs(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Raw logprob of each token but the first, by one plain forward pass; [N - 1]."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()


def plain_model(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, dtype: str = "float32"
) -> torch.nn.Module:
    """The model as transformers runs it, with other weights where given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if tensors is not None:
        model.load_state_dict(tensors, strict=False)
    return model.eval()


class Snapshots:
    """A chain of full-parameter snapshots of one model folder, and adapters over it."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root
        self.layers: list[SnapshotLayer] = []
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._writer = SnapshotWriter(folder, "tiny")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._names = {name: p.detach().clone() for name, p in model.named_parameters()}

    def full(self, name: str, seed: int) -> list[SnapshotLayer]:
        """Save the next one, a base first and then deltas; returns the chain from its base."""
        kind = SnapshotKind.DELTA if self.layers else SnapshotKind.BASE
        parent = self.layers[-1].name if self.layers else None
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in self._names.items()
        }
        staging = self._staging(name)
        saved = self._writer.save(staging, name, kind, parent, tensors)
        self.layers.append(_layer(name, staging, saved))
        self.tensors[name] = tensors
        return list(self.layers)

    def adapter(self, name: str, seed: int, rank: int = 4) -> list[SnapshotLayer]:
        """Save a random adapter over some linear layers."""
        generator = torch.Generator().manual_seed(seed)
        adapted = ("q_proj", "o_proj", "down_proj", "query_key_value.weight")
        pairs = {
            key.removesuffix(".weight"): (
                torch.randn(rank, tensor.shape[1], generator=generator) * 0.3,
                torch.randn(tensor.shape[0], rank, generator=generator) * 0.3,
            )
            for key, tensor in self._names.items()
            if any(part in key for part in adapted)
        }
        staging = self._staging(name)
        saved = write_adapter(
            staging,
            name,
            pairs,
            alpha=8.0,
            base_model=str(self.folder),
            revision=None,
            model_folder=self.folder,
        )
        return [_layer(name, staging, saved)]

    def _staging(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True)
        return folder


def _layer(name: str, folder: Path, saved: SavedSnapshot) -> SnapshotLayer:
    return SnapshotLayer(
        name, saved.kind, saved.format, folder, saved.files.digest, saved.result_digest
    )
