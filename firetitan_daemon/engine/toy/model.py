"""The toy model: the next token depends on the last one alone, through two small matrices.

Knows: numpy. Must not know: training, sampling, files. Its weights are the same on every machine.

Shape legend: `V` vocabulary, `H` hidden, `R` rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Float32Array, LoraSpec, ModelInfo, ModelSpec
from firetitan_daemon.engine.raw import RawTensor, RawTensors, result_digest

Float64Array = npt.NDArray[np.float64]
Weights = dict[str, Float32Array]

TOY_MODEL = "firetitan/toy"
"""Name to give as `base_model`."""
VOCAB = 64
HIDDEN = 16
MAX_CONTEXT = 8192
EOS = 0
"""Token that ends a sequence."""

EMBED = "embed.weight"
UNEMBED = "unembed.weight"
ADAPTED = "unembed"
"""The layer an adapter is on."""
LORA_A = "unembed.lora_A.weight"
LORA_B = "unembed.lora_B.weight"
_SEED = 20240229


def base_weights() -> Weights:
    """Embedding [V, H] and unembedding [V, H], float32."""
    draw = np.random.Generator(np.random.PCG64(_SEED))
    return {
        EMBED: draw.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
        UNEMBED: (draw.standard_normal((VOCAB, HIDDEN)) / np.sqrt(HIDDEN)).astype(np.float32),
    }


def lora_weights(spec: LoraSpec, seed: int) -> Weights:
    """A fresh adapter on the unembedding: uniform A [R, H], zero B [V, R]."""
    draw = np.random.Generator(np.random.PCG64(seed))
    bound = 1.0 / np.sqrt(HIDDEN)
    return {
        LORA_A: draw.uniform(-bound, bound, (spec.rank, HIDDEN)).astype(np.float32),
        LORA_B: np.zeros((VOCAB, spec.rank), np.float32),
    }


def merged(base: Weights, trained: Weights, lora: LoraSpec | None) -> Weights:
    """The two matrices a session stands for."""
    if lora is None:
        return trained
    delta = np.float32(lora.alpha / lora.rank) * (trained[LORA_B] @ trained[LORA_A])
    return {EMBED: base[EMBED], UNEMBED: base[UNEMBED] + delta}


def logits_table(weights: Mapping[str, Float32Array]) -> Float32Array:
    """Logits after each token, shape [V, V], float32."""
    return weights[EMBED] @ weights[UNEMBED].T


def logprob_table(logits_VV: Float32Array) -> Float64Array:
    """Log-softmax of each row, shape [V, V], float64."""
    shifted_VV = (logits_VV - logits_VV.max(axis=1, keepdims=True)).astype(np.float64)
    return shifted_VV - np.log(np.exp(shifted_VV).sum(axis=1, keepdims=True))


def raw(weights: Mapping[str, Float32Array]) -> dict[str, RawTensor]:
    """The weights as bytes."""
    return {name: RawTensor.of_array(array) for name, array in weights.items()}


def arrays(tensors: RawTensors) -> Weights:
    """Float32 copies of raw tensors."""
    return {name: np.array(tensor.array(), np.float32) for name, tensor in tensors.items()}


def describe(spec: ModelSpec) -> ModelInfo:
    """What an engine says of the toy model.

    Raises:
        FiretitanError: INVALID_ARGUMENT where more context is asked for than there is.
    """
    context = MAX_CONTEXT if spec.max_context_length is None else spec.max_context_length
    if not 1 <= context <= MAX_CONTEXT:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"max_context_length={context}: {TOY_MODEL} takes 1 to {MAX_CONTEXT}",
            field="max_context_length",
        )
    return ModelInfo(
        path="",
        source="toy (a bigram model made for tests)",
        fingerprint=result_digest(raw(base_weights())),
        architecture="toy",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB,
        max_context_length=context,
        num_parameters=2 * VOCAB * HIDDEN,
        packed=True,
        num_threads=1,
        notes=("not a language model",),
        versions={"numpy": np.__version__},
    )


def decode(token_ids: Sequence[int]) -> str:
    """Text of tokens: one printable character each."""
    return "".join(chr(32 + int(token)) for token in token_ids)
