"""tinker's types to messages and back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from firetitan.v1 import operation_pb2, tensor_pb2, training_service_pb2

from firetitan_client import convert, types
from firetitan_client.errors import InvalidArgument, Unsupported


def datum(**inputs: Any) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs=inputs)


def sent(message: tensor_pb2.Datum, name: str) -> np.ndarray:
    return convert.tensor_from_proto(message.loss_fn_inputs[name])


def test_datum_of_lists() -> None:
    (message,) = convert.data_to_proto([datum(target_tokens=[6, 7, 8], weights=[0.0, 1.0, -0.5])])
    tokens = np.frombuffer(message.model_input.chunks[0].encoded_text.token_ids, "<i4")
    assert tokens.tolist() == [5, 6, 7]
    assert sent(message, "target_tokens").dtype == np.int64
    assert sent(message, "target_tokens").tolist() == [6, 7, 8]
    assert sent(message, "weights").dtype == np.float32
    assert sent(message, "weights").tolist() == [0.0, 1.0, -0.5]


def test_chunks_are_joined() -> None:
    model_input = tinker.ModelInput(
        chunks=[
            tinker.EncodedTextChunk(tokens=[1, 2]),
            tinker.EncodedTextChunk(tokens=[]),
            tinker.EncodedTextChunk(tokens=[3]),
        ]
    )
    assert convert.tokens_of(model_input, "x").tolist() == [1, 2, 3]


def test_sparse_targets_become_dense() -> None:
    targets = torch.zeros(8, 8, dtype=torch.int64)
    targets[3, 2], targets[7, 7] = 9, 4
    weights = torch.zeros(8, 8)
    weights[3, 2] = 0.25
    made = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(range(8))),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    assert made.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    (message,) = convert.data_to_proto([made])
    assert np.array_equal(sent(message, "target_tokens"), targets.numpy())
    assert np.array_equal(sent(message, "weights"), weights.numpy())
    assert list(message.loss_fn_inputs["weights"].shape) == [8, 8]


def test_anything_with_the_attributes_will_do() -> None:
    plain = SimpleNamespace(
        model_input=[1, 2],
        loss_fn_inputs={"target_tokens": np.array([2, 3], np.int32), "advantages": [1, 2]},
    )
    (message,) = convert.data_to_proto([plain])
    assert sent(message, "target_tokens").dtype == np.int64
    assert sent(message, "advantages").dtype == np.float32


def test_older_tensor_data_is_flat_lists() -> None:
    old = SimpleNamespace(
        data=[1.0, 2.0, 3.0, 4.0], dtype="float32", shape=[2, 2], sparse_crow_indices=None
    )
    assert convert.loss_input(old, "weights", "w").tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_torch_tensors_of_half_precision() -> None:
    value = torch.tensor([0.5, 1.5], dtype=torch.bfloat16)
    assert convert.loss_input(value, "advantages", "a").tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "No data provided"),
        ([3], r"data\[0\]: is a int"),
        ([SimpleNamespace(model_input=[1.5], loss_fn_inputs={})], r"data\[0\].model_input"),
        ([SimpleNamespace(model_input=[2**31], loss_fn_inputs={})], "2147483648"),
        (
            [SimpleNamespace(model_input=[1], loss_fn_inputs={"weights": [[1], [1, 2]]})],
            r'data\[0\].loss_fn_inputs\["weights"\]: is ragged',
        ),
        (
            [SimpleNamespace(model_input=[1], loss_fn_inputs={"target_tokens": [1.5]})],
            "holds fractions",
        ),
        ([SimpleNamespace(model_input=[1], loss_fn_inputs={"weights": ["a"]})], "give numbers"),
    ],
)
def test_wrong_data_is_named(data: list[Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        convert.data_to_proto(data)


def test_one_datum_is_not_a_list() -> None:
    with pytest.raises(ValueError, match="give a list"):
        convert.data_to_proto(datum(target_tokens=[6, 7, 8]))


def test_images_are_refused() -> None:
    image = SimpleNamespace(chunks=[SimpleNamespace(data=b"", format="png")])
    with pytest.raises(Unsupported, match=r"prompt.chunks\[0\]"):
        convert.tokens_of(image, "prompt")


def test_custom_data_keeps_extras_here() -> None:
    data = [datum(target_tokens=[6, 7, 8], advantages=[1.0, 1.0, 1.0])]
    (message,) = convert.custom_data_to_proto(data)
    assert set(message.loss_fn_inputs) == {"target_tokens"}


def test_custom_data_without_targets_is_shifted() -> None:
    (message,) = convert.custom_data_to_proto([datum(weights=[1.0, 1.0, 1.0])])
    assert sent(message, "target_tokens").tolist() == [6, 7]
    tokens = np.frombuffer(message.model_input.chunks[0].encoded_text.token_ids, "<i4")
    assert tokens.tolist() == [5, 6]


def test_loss_config() -> None:
    settings = convert.loss_config_to_proto({"beta": 1, "mode": "x", "absent": None})
    assert dict(settings.items()) == {"beta": 1.0, "mode": "x"}
    with pytest.raises(InvalidArgument, match=r'loss_fn_config\["beta"\]'):
        convert.loss_config_to_proto({"beta": [1]})


def test_adam_params_keep_every_field() -> None:
    params = tinker.AdamParams(
        learning_rate=0.5, beta1=0.1, beta2=0.2, eps=0.3, weight_decay=0.4, grad_clip_norm=0.6
    )
    message = convert.adam_params_to_proto(params)
    found = {field.name: value for field, value in message.ListFields()}
    assert found == {
        "learning_rate": 0.5,
        "beta1": 0.1,
        "beta2": 0.2,
        "eps": 0.3,
        "weight_decay": 0.4,
        "grad_clip_norm": 0.6,
    }
    with pytest.raises(InvalidArgument, match="adam_params"):
        convert.adam_params_to_proto("fast")


@pytest.mark.parametrize("value", ["num_sequences", "NUM_SEQUENCES"])
def test_normalization_by_text(value: str) -> None:
    expected = training_service_pb2.GRAD_ACC_NORMALIZATION_NUM_SEQUENCES
    assert convert.normalization_to_proto(value) == expected


def test_normalization_of_other_enums_and_none() -> None:
    from firetitan_client import GradAccNormalization

    assert (
        convert.normalization_to_proto(GradAccNormalization.NUM_LOSS_TOKENS)
        == training_service_pb2.GRAD_ACC_NORMALIZATION_NUM_LOSS_TOKENS
    )
    none = training_service_pb2.GRAD_ACC_NORMALIZATION_NONE
    assert convert.normalization_to_proto(None) == none
    with pytest.raises(ValueError, match="Unknown grad_accumulation_normalization"):
        convert.normalization_to_proto("mean")


def test_forward_output_is_tinkers() -> None:
    result = operation_pb2.ForwardResult(metrics={"loss:sum": 2.0})
    rows = np.array([[0.5, 1.0]], np.float32)
    result.outputs.add().tensors["logprobs"].CopyFrom(convert.tensor_to_proto(rows))
    output = convert.forward_output(result)
    assert isinstance(output, tinker.ForwardBackwardOutput)
    tensor = output.loss_fn_outputs[0]["logprobs"]
    assert tensor.data == [0.5, 1.0]
    assert tensor.shape == [1, 2]
    assert output.metrics == {"loss:sum": 2.0}


def test_response_tokens() -> None:
    messages = convert.data_to_proto(
        [datum(target_tokens=[6, 7, 8], weights=[0.0, 1.0, -1.0]), datum(target_tokens=[6, 7, 8])]
    )
    assert convert.response_tokens(messages) == 5.0


def test_a_tensor_of_a_result_can_be_written_to() -> None:
    received = types.TensorData(np.frombuffer(np.ones(2, "<f4").tobytes(), "<f4"))
    assert received.to_torch().mul_(2).tolist() == [2.0, 2.0]
