"""What the daemon knows of models and shapes: frozen records, as those of `records`.

Knows: names, plain values. Must not know: how they are stored or sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoutingShape:
    """The expert choices of a mixture of experts: layers x experts_per_token indices a token."""

    layers: int
    """Layers that choose among experts, in the model's order; dense layers do not count."""
    experts_per_token: int
    num_experts: int

    @property
    def index_bytes(self) -> int:
        """Bytes of one expert index: 1 where all fit, else 2 (little-endian)."""
        return 1 if self.num_experts <= 256 else 2

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one token's routing matrix."""
        return self.layers * self.experts_per_token * self.index_bytes


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded; goes into every checkpoint, snapshot and `Describe`."""

    path: str
    """Local folder the weights and the tokenizer came from."""
    source: str
    """Where that folder came from, in words, e.g. `hub`, `folder`, `gguf (dequantised Q4_1)`."""
    fingerprint: str
    """BLAKE3 over the weight files, hex."""
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_context_length: int
    num_parameters: int
    packed: bool
    """False where the packed attention disagreed with the model's own: the padded path is used."""
    num_threads: int
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """`torch`, `transformers`, `cpu_capability`: what replay must find unchanged."""
    revision: str = ""
    """Commit of the hub repository; empty for anything else."""
    routing: RoutingShape | None = None
    """None for a dense model, and where the choices can be neither recorded nor forced."""


@dataclass(frozen=True)
class BaseFacts:
    """The weights and the tokenizer a session began with, as far as they are known."""

    fingerprint: str = ""
    """BLAKE3 over the base model's files, hex."""
    revision: str = ""
    """Commit of a hub repository; empty for anything else."""
    tokenizer: str = ""
    """Hugging Face id, or folder, of the tokenizer."""


@dataclass(frozen=True)
class Shape:
    """What a trainer or a deployment of this name is; 0, empty and `auto` leave it open."""

    name: str
    version: int = 1
    base_model: str = ""
    trainer_mode: str = ""
    """`LORA_TRAINER`, `POLICY_TRAINER` (every parameter) or `FORWARD_ONLY`; of trainers."""
    max_context_length: int = 0
    dtype: str = "auto"
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    num_devices: int = 0
    """GPUs it needs."""
    deployment_shape: str = "local"
    """The deployment shape that belongs to a training shape."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A promoted snapshot: a model that is loaded by name."""

    id: str
    account: str
    kind: str
    """`hf_full`, a whole model, or `peft_adapter`."""
    snapshot: str
    """Name of the snapshot it was made from, which may be gone."""
    base_model: str
    """What it was trained on, as asked for then."""
    lora_rank: int
    folder: str
    digest: str
    result_digest: str
    size_bytes: int
    create_time: float
    base: BaseFacts = field(default_factory=BaseFacts)

    @property
    def name(self) -> str:
        """`models/{model}`."""
        return f"models/{self.id}"

    @property
    def full_name(self) -> str:
        """`accounts/{account}/models/{model}`, the documented name."""
        return f"accounts/{self.account}/models/{self.id}"
