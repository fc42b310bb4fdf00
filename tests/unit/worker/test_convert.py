"""Messages to engine values and back: what is refused names its field."""

from __future__ import annotations

import numpy as np
import pytest
from firetitan.v1 import sampling_service_pb2, tensor_pb2, training_service_pb2
from google.protobuf import struct_pb2

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ForwardOutput, Normalization
from firetitan_daemon.engine.sample_api import (
    PromptScores,
    SampledSequence,
    SampleResult,
    SampleTimes,
    StopReason,
    TokenLogprobs,
)
from firetitan_daemon.worker import convert, convert_sampling

FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
INT64 = tensor_pb2.DATA_TYPE_INT64


def tokens(*chunks: list[int]) -> tensor_pb2.ModelInput:
    message = tensor_pb2.ModelInput()
    for chunk in chunks:
        message.chunks.add().encoded_text.token_ids = np.array(chunk, dtype="<i4").tobytes()
    return message


def tensor(array: np.ndarray, data_type: tensor_pb2.DataType.ValueType) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(data_type=data_type, shape=array.shape, data=array.tobytes())


def datum() -> tensor_pb2.Datum:
    message = tensor_pb2.Datum(model_input=tokens([1, 2], [3]))
    inputs = message.loss_fn_inputs
    inputs["target_tokens"].CopyFrom(tensor(np.array([2, 3, 4], dtype="<i8"), INT64))
    inputs["weights"].CopyFrom(tensor(np.array([0, 1, 1], dtype="<f4"), FLOAT32))
    return message


def refused(message: tensor_pb2.Datum) -> FiretitanError:
    with pytest.raises(FiretitanError) as caught:
        convert.data_from_proto([datum(), message])
    assert caught.value.reason is Reason.INVALID_DATUM
    assert caught.value.field is not None
    assert caught.value.message.startswith(caught.value.field + ": ")
    return caught.value


def test_a_datum_becomes_arrays() -> None:
    (got,) = convert.data_from_proto([datum()])
    assert got.token_ids.tolist() == [1, 2, 3] and got.token_ids.dtype == np.int32
    assert got.loss_inputs["target_tokens"].dtype == np.int64
    np.testing.assert_array_equal(got.loss_inputs["weights"], np.float32([0, 1, 1]))


def test_a_matrix_keeps_its_shape_row_major() -> None:
    message = datum()
    array = np.arange(6, dtype="<i8").reshape(3, 2)
    message.loss_fn_inputs["target_tokens"].CopyFrom(tensor(array, INT64))
    (got,) = convert.data_from_proto([message])
    np.testing.assert_array_equal(got.loss_inputs["target_tokens"], array)


def test_bytes_that_do_not_fill_the_shape() -> None:
    message = datum()
    message.loss_fn_inputs["weights"].shape[:] = [4]
    error = refused(message)
    assert error.field == 'data[1].loss_fn_inputs["weights"]'
    assert "has 12 bytes, shape [4] of float32 takes 16" in error.message


@pytest.mark.parametrize("shape", [[-1, -3], [-3]])
def test_negative_extents(shape: list[int]) -> None:
    message = datum()
    message.loss_fn_inputs["weights"].shape[:] = shape
    assert "extents are 0 or more" in refused(message).message


def test_huge_extents_do_not_overflow() -> None:
    message = datum()
    message.loss_fn_inputs["weights"].shape[:] = [2**62, 2**62]
    assert "12 bytes" in refused(message).message


@pytest.mark.parametrize("data_type", [0, 77])
def test_unknown_element_types(data_type: int) -> None:
    message = datum()
    message.loss_fn_inputs["weights"].data_type = data_type  # type: ignore[assignment]
    assert f"data_type {data_type}" in refused(message).message


def test_wrong_element_types_by_name() -> None:
    message = datum()
    message.loss_fn_inputs["weights"].CopyFrom(tensor(np.array([1, 2, 3], dtype="<i8"), INT64))
    assert "is int64; send it as float32" in refused(message).message
    message = datum()
    message.loss_fn_inputs["target_tokens"].CopyFrom(tensor(np.float32([1, 2, 3]), FLOAT32))
    assert "is float32; send it as int64" in refused(message).message


def test_a_scalar_or_a_cube_is_no_loss_input() -> None:
    message = datum()
    message.loss_fn_inputs["weights"].CopyFrom(tensor(np.zeros((1, 1, 1), "<f4"), FLOAT32))
    assert "give [N] or [N, K]" in refused(message).message


def test_half_a_token() -> None:
    message = datum()
    message.model_input.chunks[1].encoded_text.token_ids = b"\1\0\0"
    error = refused(message)
    assert error.field == "data[1].model_input.chunks[1].encoded_text.token_ids"
    assert "3 bytes" in error.message


def test_a_chunk_of_an_unknown_kind() -> None:
    message = datum()
    message.model_input.chunks.add()
    assert refused(message).field == "data[1].model_input.chunks[2]"


def test_loss_config_takes_numbers_and_texts_only() -> None:
    config = struct_pb2.Struct()
    config.update({"clip_low": 0.5, "mode": "token"})
    assert convert.loss_config_from_proto(config) == {"clip_low": 0.5, "mode": "token"}
    for value, found in ((True, "bool"), (None, "null"), ([1], "list"), ({"a": 1}, "struct")):
        config = struct_pb2.Struct()
        config.update({"x": value})
        with pytest.raises(FiretitanError, match=f"is a {found}") as caught:
            convert.loss_config_from_proto(config)
        assert caught.value.field == 'loss_fn_config["x"]'


def test_output_grads_must_be_float32() -> None:
    good = tensor(np.float32([1, 2]), FLOAT32)
    (array,) = convert.output_grads_from_proto([good])
    assert array.tolist() == [1, 2]
    with pytest.raises(FiretitanError, match=r"output_grads\[1\]: is int64"):
        convert.output_grads_from_proto([good, tensor(np.array([1], dtype="<i8"), INT64)])


def test_optimizer_settings() -> None:
    request = training_service_pb2.OptimStepRequest()
    with pytest.raises(FiretitanError, match="adam_params: missing"):
        convert.adam_params_from_proto(request)
    request.adam_params.learning_rate = 0.5
    request.adam_params.grad_clip_norm = 2.0
    params = convert.adam_params_from_proto(request)
    assert (params.learning_rate, params.beta1, params.grad_clip_norm) == (0.5, 0.0, 2.0)


def test_normalization() -> None:
    assert convert.normalization_from_proto(0) is Normalization.NONE
    assert convert.normalization_from_proto(2) is Normalization.NUM_LOSS_TOKENS
    assert convert.normalization_from_proto(3) is Normalization.NUM_SEQUENCES
    with pytest.raises(FiretitanError, match="9 is unknown"):
        convert.normalization_from_proto(9)


def test_a_forward_result_round_trips_bit_for_bit() -> None:
    logprobs = np.float32([[-0.1, -np.inf], [np.nan, 3e-45]])
    output = ForwardOutput(outputs=[{"logprobs": logprobs}], metrics={"loss:sum": 1.5}, graph=None)
    message = convert.forward_result_to_proto(output, step=7)
    assert (message.graph, message.step, message.metrics["loss:sum"]) == ("", 7, 1.5)
    got = convert.tensor_from_proto(message.outputs[0].tensors["logprobs"], "x")
    assert got.tobytes() == logprobs.tobytes() and got.shape == (2, 2)


def test_default_length_is_what_the_prompt_leaves() -> None:
    message = sampling_service_pb2.SampleRequest(prompt=tokens([5, 6]))
    message.params.seed = 0
    for context_length, expected in ((4096, 1024), (1026, 1024), (1025, 1023), (3, 1), (2, 1)):
        got = convert_sampling.sample_request_from_proto(message, (), context_length)
        assert got.max_tokens == expected
    message.params.max_tokens = 1024
    assert convert_sampling.sample_request_from_proto(message, (), 10).max_tokens == 1024


def test_sample_request_defaults() -> None:
    message = sampling_service_pb2.SampleRequest(prompt=tokens([5, 6]))
    with pytest.raises(FiretitanError, match="seed: missing"):
        convert_sampling.sample_request_from_proto(message, (), 4096)
    message.params.seed = 0
    got = convert_sampling.sample_request_from_proto(message, (), 4096)
    assert (got.seed, got.num_samples, got.max_tokens, got.temperature) == (0, 1, 1024, 1.0)
    assert (got.top_k, got.top_p, got.use_eos, got.snapshot) == (0, 1.0, True, None)
    message.params.temperature = 0.0
    message.params.ignore_eos = True
    message.params.stop.append("x")
    got = convert_sampling.sample_request_from_proto(message, (), 4096)
    assert (got.temperature, got.use_eos, got.stop) == (0.0, False, ("x",))


@pytest.mark.parametrize("loaded", ["snapshots/a-1", "a-1"])
def test_a_snapshot_is_found_by_either_form_of_its_name(loaded: str) -> None:
    message = sampling_service_pb2.SampleRequest(snapshot="snapshots/a-1", prompt=tokens([1]))
    message.params.seed = 1
    assert convert_sampling.sample_request_from_proto(message, (loaded,), 4096).snapshot == loaded


def test_a_bad_prompt_is_an_invalid_argument() -> None:
    message = sampling_service_pb2.SampleRequest(prompt=tokens([1]))
    message.params.seed = 1
    message.prompt.chunks[0].encoded_text.token_ids = b"1"
    with pytest.raises(FiretitanError) as caught:
        convert_sampling.sample_request_from_proto(message, (), 4096)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == "prompt.chunks[0].encoded_text.token_ids"


def test_a_sample_response() -> None:
    sequence = SampledSequence(
        token_ids=np.int32([3, 4]),
        sampling_logprobs=np.float32([-1, -2]),
        inference_logprobs=np.float32([-3, -4]),
        stop_reason=StopReason.LENGTH,
    )
    result = SampleResult(
        sequences=[sequence],
        snapshot="a-1",
        prompt=PromptScores(
            top=TokenLogprobs(np.int32([[0, 0], [5, 6]]), np.float32([[-9, -9], [-1, -2]])),
            targets=np.float32([[-0.5]]),
        ),
        times=SampleTimes(0.25, 1.5, 2.0, 0.0, 3.0),
        cached_prompt_tokens=2,
        num_concurrent=4,
    )
    message = convert_sampling.sample_response_to_proto(result)
    assert message.snapshot == "snapshots/a-1" and message.prompt_logprobs == b""
    assert np.frombuffer(message.sequences[0].token_ids, "<i4").tolist() == [3, 4]
    assert np.frombuffer(message.sequences[0].inference_logprobs, "<f4").tolist() == [-3, -4]
    assert message.sequences[0].stop_reason == sampling_service_pb2.STOP_REASON_LENGTH
    assert message.queue_duration.ToSeconds() == 0 and message.queue_duration.nanos == 250_000_000
    assert message.prefill_duration.ToTimedelta().total_seconds() == 1.5
    assert message.first_token_duration.ToSeconds() == 2
    assert message.generation_duration.ToSeconds() == 3
    assert (message.cached_prompt_tokens, message.num_concurrent_requests) == (2, 4)
    assert message.prompt_top_logprobs.per_position == 2
    assert np.frombuffer(message.prompt_top_logprobs.token_ids, "<i4").tolist() == [0, 0, 5, 6]
    assert list(message.target_prompt_logprobs.shape) == [1, 1]
    assert not message.HasField("prompt_alt_tokens")
