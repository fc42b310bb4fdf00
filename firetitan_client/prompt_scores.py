"""Scores of prompts and samples: what may be asked for, and answers in tinker's types.

Knows: tinker's score types of every version, SampleRequest. Must not know: how requests are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from firetitan.v1 import sampling_service_pb2

from firetitan_client import convert, types

_MOST = 2**31 - 1
_SKIPPED = -1


@dataclass(frozen=True)
class Scores:
    """What is asked for beside the samples; names and meanings are `sample`'s arguments."""

    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None

    def ask(self, request: sampling_service_pb2.SampleRequest) -> None:
        """Put it into a request that has its prompt.

        Raises:
            ValueError: A malformed argument, by name.
        """
        request.prompt_logprobs = bool(self.include_prompt_logprobs)
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            value = convert.whole_number(getattr(self, name), name, 0, _MOST)
            setattr(request, name, value)
        length = len(request.prompt.chunks[0].encoded_text.token_ids) // 4
        if self.prompt_logprobs_last_n is not None:
            if not self.include_prompt_logprobs:
                raise convert.invalid(
                    "prompt_logprobs_last_n", "needs include_prompt_logprobs=True"
                )
            request.prompt_logprobs_last_n = convert.whole_number(
                self.prompt_logprobs_last_n, "prompt_logprobs_last_n", 1, max(1, length - 1)
            )
        if self.target_prompt_logprobs is not None:
            targets = _targets(self.target_prompt_logprobs, length)
            request.target_prompt_logprobs.CopyFrom(convert.tensor_to_proto(targets))


def _targets(value: Any, length: int) -> npt.NDArray[np.int64]:
    """Token ids to score, dense [P - 1, K]; -1 where nothing is asked for."""
    field = "target_prompt_logprobs"
    if getattr(value, "sparse_crow_indices", None) is not None:
        rows, columns = _cells(value)
        array = np.full(tuple(value.shape), _SKIPPED, np.int64)
        array[rows, columns] = np.asarray(value.data, np.int64)
    elif hasattr(value, "to_numpy"):
        array = value.to_numpy()
    else:
        array = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
    if array.dtype.kind not in "iu":
        raise convert.invalid(field, f"is {array.dtype.name}; give token ids as int64")
    if array.ndim != 2 or len(array) != length - 1:
        raise convert.invalid(
            field,
            f"has shape {list(array.shape)}; give [{length - 1}, K], one row a prompt token "
            "but the first",
        )
    return array.astype(np.int64)


def _cells(sparse: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of each listed cell of a CSR tensor."""
    starts = np.asarray(sparse.sparse_crow_indices, np.int64)
    columns = np.asarray(sparse.sparse_col_indices, np.int64)
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts)), columns


def target_logprobs(response: sampling_service_pb2.SampleResponse, asked: Any) -> Any:
    """Logprobs of the tokens asked for, as TensorData in the layout they were asked in."""
    found = convert.tensor_from_proto(response.target_prompt_logprobs)
    if getattr(asked, "sparse_crow_indices", None) is None:
        return types.tensor_data(found)
    return types.sparse_like(asked, found[_cells(asked)])


def top_logprobs(table: sampling_service_pb2.TokenLogprobs) -> Any:
    """Likeliest tokens as tinker's pair of matrices [n, k]."""
    ids, logprobs = tables(table)
    return types.result_type("TopkLogprobs")(token_ids=ids, logprobs=logprobs)


def top_lists(table: sampling_service_pb2.TokenLogprobs) -> list[list[tuple[int, float]] | None]:
    """Likeliest tokens as lists of (token, logprob), None where a position was not scored."""
    ids, logprobs = tables(table)
    return [
        None if row_logprobs[0] == types.NOT_SCORED else list(zip(row, row_logprobs, strict=True))
        for row, row_logprobs in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]


def alternatives(table: sampling_service_pb2.TokenLogprobs) -> Any:
    """Draws beside the prompt's tokens as tinker's PromptAltTokens, [P - 1, k]."""
    ids, logprobs = tables(table)
    return types.result_type("PromptAltTokens")(
        tokens=types.tensor_data(ids.astype(np.int64)), logprobs=types.tensor_data(logprobs)
    )


def tables(
    table: sampling_service_pb2.TokenLogprobs,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Token ids and logprobs, both [n, k]."""
    shape = (-1, table.per_position)
    return (
        np.frombuffer(table.token_ids, "<i4").reshape(shape).astype(np.int32),
        np.frombuffer(table.logprobs, "<f4").reshape(shape).astype(np.float32),
    )
