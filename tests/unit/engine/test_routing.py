"""Routing matrices as bytes, and models whose routers are of another kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import RoutingShape
from firetitan_daemon.engine.api import Datum, LoraSpec, ModelSpec, SessionSpec
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.routing import OWN_CHOICE, Recording, experts_of
from firetitan_daemon.engine.sample_api import SampleRequest

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(("experts", "index"), [(256, "<u1"), (257, "<u2")])
def test_matrices_are_layers_by_experts_in_the_least_bytes(experts: int, index: str) -> None:
    shape = RoutingShape(layers=3, experts_per_token=2, num_experts=experts)
    generator = torch.Generator().manual_seed(0)
    layers = [
        torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(5)])
        for _ in range(3)
    ]
    matrices = Recording(layers, shape).matrices
    assert {len(matrix) for matrix in matrices} == {shape.matrix_bytes}
    assert shape.matrix_bytes == 6 * int(index[-1])
    second = np.frombuffer(matrices[1], index).reshape(3, 2)
    assert second.tolist() == [layer[1].tolist() for layer in layers]
    again = experts_of(matrices, 5, shape, "matrices")
    assert again is not None and torch.equal(again, torch.stack(layers, 1))


def test_empty_matrices_leave_the_choice_to_the_routers() -> None:
    shape = RoutingShape(layers=1, experts_per_token=2, num_experts=4)
    experts = experts_of([b"", b"\2\0", b""], 3, shape, "matrices")
    assert experts is not None
    assert experts.tolist() == [[[OWN_CHOICE] * 2], [[2, 0]], [[OWN_CHOICE] * 2]]
    assert experts_of([], 3, shape, "matrices") is None
    assert experts_of([b""] * 3, 3, shape, "matrices") is None


@pytest.fixture
def sigmoid_routers(tmp_path: Path) -> str:
    """A mixture of experts whose routers score by sigmoid, in groups."""
    config = transformers.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_routers_of_another_kind_train_and_sample_without_matrices(sigmoid_routers: str) -> None:
    trainer = HfTrainEngine(ModelSpec(sigmoid_routers))
    assert trainer.info.routing is None
    assert any("neither recorded nor replayed" in note for note in trainer.info.notes)
    trainer.open_session(SessionSpec(seed=1, lora=LoraSpec(2)))
    tokens = np.int32([1, 2, 3])
    inputs = {"target_tokens": np.int64([2, 3, 4])}
    trainer.forward_backward([Datum(tokens, inputs, [b""] * 3)], "cross_entropy", {})
    with pytest.raises(FiretitanError, match="no plain softmax router") as caught:
        trainer.forward([Datum(tokens, inputs, [b"\0\1"] * 3)], "cross_entropy", {})
    assert caught.value.reason is Reason.UNSUPPORTED
    assert caught.value.field == "data[0].model_input.routing_matrices"

    sampler = HfSampleEngine(ModelSpec(sigmoid_routers))
    try:
        request = SampleRequest(tokens, 1, 2, seed=1, use_eos=False)
        assert len(sampler.submit(request).result().sequences[0].token_ids) == 2
        for asked in ({"routing": True}, {"prompt_routing": True}):
            with pytest.raises(FiretitanError, match="routing_matrices") as caught:
                sampler.submit(SampleRequest(tokens, 1, 2, seed=1, **asked))
            assert caught.value.reason is Reason.UNSUPPORTED
    finally:
        sampler.close()
