"""Every code block of the documented API, as it is written there, over a real daemon and model.

Only the model, the checkpoint's home and the number of steps are this machine's. Blocks of calls
that are not there yet must say so, and what to do instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from support.daemon import DaemonProcess
from support.data import ragged_data

from firetitan_client import FiretitanServiceClient, GradAccNormalization

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("documented") / "home")
    process.start()
    yield process
    process.stop()


@pytest.fixture(autouse=True)
def address(running: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRETITAN_ADDRESS", running.address)


@pytest.fixture(scope="module")
def base_model(tiny_llama: Path) -> str:
    return str(tiny_llama)


@pytest.fixture(scope="module")
def datums() -> list[tinker.Datum]:
    return ragged_data(seed=4, count=3)


def make_service(base_model: str, lora_rank: int) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        base_model=base_model,
        lora_rank=lora_rank,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )


@pytest.fixture(scope="module")
def service(running: DaemonProcess, base_model: str) -> Iterator[FiretitanServiceClient]:
    """One full-parameter policy for the blocks that only use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRETITAN_ADDRESS", running.address)
        with make_service(base_model, 0) as service:
            service.create_training_client(base_model=base_model, lora_rank=0)
            yield service


@pytest.fixture
def training_client(service: FiretitanServiceClient) -> Any:
    """The policy, with nothing accumulated from the block before."""
    return FiretitanServiceClient(base_url=service.base_url).create_training_client()


def train(training_client: Any, datums: Any) -> None:
    training_client.forward_backward(datums, "cross_entropy")
    training_client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()


def tokens_of(sampler: Any) -> list[int]:
    prompt = tinker.ModelInput.from_ints([72, 105])
    params = tinker.SamplingParams(max_tokens=8, temperature=0.0)
    return list(sampler.sample(prompt, 1, params).result().sequences[0].tokens)


def test_from_firetitan_config(running: DaemonProcess, base_model: str) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        api_key="<FIREWORKS_API_KEY>",
        base_url="https://api.fireworks.ai",
        base_model=base_model,
        tokenizer_model=base_model,
        lora_rank=0,
        training_shape_id="accounts/fireworks/trainingShapes/qwen3-8b-128k-h200",
        deployment_id="research-serving",
        learning_rate=1e-5,
        replica_count=1,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="scale_to_zero",
    )
    training_client = service.create_training_client(
        base_model=base_model,
        lora_rank=0,
    )
    assert service.trainer_job_id == training_client.trainer_job_id
    assert service.deployment_id == "research-serving"
    assert service.max_context_length == 256
    assert service.reference_trainer_job_id is None
    tokenizer = training_client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    with pytest.raises(ValueError, match="already exists on this service"):
        service.create_training_client(base_model=base_model, lora_rank=0)
    service.close()


def test_bare_constructor_and_connecting_to_an_existing_trainer(
    service: FiretitanServiceClient, base_model: str
) -> None:
    bare = FiretitanServiceClient(base_url=service.base_url, api_key="<FIREWORKS_API_KEY>")
    training_client = bare.create_training_client(
        base_model=base_model,
        lora_rank=0,
    )
    assert training_client.trainer_job_id == service.trainer_job_id


def test_create_base_training_client(base_model: str, datums: list[tinker.Datum]) -> None:
    with make_service(base_model, 4) as service:
        training_client = service.create_training_client(base_model=base_model, lora_rank=4)
        untrained = training_client.forward(datums, "cross_entropy").result().metrics["loss:sum"]
        train(training_client, datums)
        reference_client = service.create_base_training_client(base_model=base_model)
        ref = reference_client.forward(datums, "cross_entropy").result()
        assert ref.metrics["loss:sum"] == untrained


def test_create_sampling_client_serves_the_saved_weights(
    service: FiretitanServiceClient, training_client: Any, datums: list[tinker.Datum]
) -> None:
    before = tokens_of(service.create_sampling_client())
    for _ in range(4):
        train(training_client, datums)
    saved = training_client.save_weights_for_sampler("step-100").result()
    sampler = service.create_sampling_client(model_path=saved.path)
    assert tokens_of(sampler) != before


async def test_create_deployment_sampler(
    service: FiretitanServiceClient, training_client: Any, base_model: str
) -> None:
    from firetitan_client import FixedConcurrencyController

    saved = await training_client.save_weights_for_sampler("native")
    tokenizer = training_client.get_tokenizer()
    controller = FixedConcurrencyController(4)
    sampler = await service.create_deployment_sampler(
        model_path=saved.path,
        tokenizer=tokenizer,
        concurrency_controller=controller,
    )
    completions = await sampler.sample_with_tokens(
        [{"role": "user", "content": "Hi"}], n=2, max_tokens=5, temperature=0.7
    )
    assert len(completions) == 2
    for one in completions:
        assert one.snapshot == saved.path
        assert len(one.full_tokens) == one.prompt_len + one.completion_len
        assert len(one.inference_logprobs) == len(one.sampling_logprobs) == one.completion_len


def test_hotload_sampler_snapshot(
    service: FiretitanServiceClient, training_client: Any, datums: list[tinker.Datum]
) -> None:
    train(training_client, datums)
    saved = training_client.save_weights_for_sampler("low-level").result()
    service.hotload_sampler_snapshot(saved.path)
    answer = service.create_sampling_client().sample([72], 1).result()
    assert answer.snapshot == saved.path


def test_forward(training_client: Any, datums: list[tinker.Datum]) -> None:
    result = training_client.forward(datums, "cross_entropy").result()
    logprobs = result.loss_fn_outputs[0]["logprobs"].data
    assert len(logprobs) == datums[0].model_input.length
    assert all(value < 0 for value in logprobs)


def test_weight_only_datums_fail_by_name(training_client: Any) -> None:
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"weights": [1.0] * 3}
    )
    with pytest.raises(ValueError, match="missing required field 'target_tokens'"):
        training_client.forward([datum], "cross_entropy").result()


def test_forward_backward_custom(training_client: Any, datums: list[tinker.Datum]) -> None:
    def compute_loss(data: Any, logprobs_list: Any) -> Any:
        return -sum(row.sum() for row in logprobs_list) / len(data)

    def my_loss(data: Any, logprobs_list: Any) -> Any:
        loss = compute_loss(data, logprobs_list)
        return loss, {"loss": float(loss.item())}

    result = training_client.forward_backward_custom(datums, my_loss).result()
    assert result.metrics["loss"] == pytest.approx(result.metrics["loss:sum"])
    assert training_client.optim_step(tinker.AdamParams()).result().metrics["grad_norm"] > 0


def test_forward_backward_custom_over_embeddings(
    training_client: Any, datums: list[tinker.Datum]
) -> None:
    def embedding_loss(data: Any, embeddings: Any) -> Any:
        loss = -torch.nn.functional.cosine_similarity(embeddings[0], embeddings[-1], dim=0)
        return loss + 0 * sum(row.sum() for row in embeddings), {"loss": float(loss.item())}

    result = training_client.forward_backward_custom(
        datums,
        embedding_loss,
        output="embedding",
        pooling="mean",
    ).result()
    assert -1.001 <= result.metrics["loss"] <= 1.001
    training_client.optim_step(tinker.AdamParams(learning_rate=0.0)).result()


def test_optim_step(training_client: Any, datums: list[tinker.Datum]) -> None:
    training_client.forward_backward(datums, "cross_entropy").result()
    training_client.optim_step(
        tinker.AdamParams(
            learning_rate=1e-5,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
        )
    ).result()
    for mode in (
        GradAccNormalization.NUM_LOSS_TOKENS,
        GradAccNormalization.NUM_SEQUENCES,
        GradAccNormalization.NONE,
    ):
        training_client.forward_backward(datums, "cross_entropy")
        step = training_client.optim_step(
            tinker.AdamParams(), grad_accumulation_normalization=mode
        ).result()
        assert step.metrics["grad_norm"] > 0


def test_save_weights_for_sampler(training_client: Any) -> None:
    saved = training_client.save_weights_for_sampler(
        "step-200",
        checkpoint_type="base",
    ).result()
    assert saved.path.startswith("step-200-")
    result = training_client.save_weights_for_sampler_ext(
        "step-300",
        checkpoint_type="base",
    )
    assert result.snapshot_name == result.path != saved.path


def test_state(training_client: Any, datums: list[tinker.Datum]) -> None:
    def loss() -> float:
        return float(training_client.forward(datums, "cross_entropy").result().metrics["loss:sum"])

    kept = loss()
    training_client.save_state("train_state_step_100").result()
    train(training_client, datums)
    assert loss() != kept
    training_client.load_state_with_optimizer("train_state_step_100").result()
    assert loss() == kept
    train(training_client, datums)
    training_client.load_state("train_state_step_100").result()
    assert loss() == kept


def test_list_checkpoints_and_resolve_checkpoint_path(base_model: str) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=base_model,
        lora_rank=4,
        trainer_job_id="previous-job-id",
        create_deployment=False,
        cleanup_trainer_on_close=True,
    )
    training_client = service.create_training_client(base_model=base_model, lora_rank=4)
    for name in ("step-10", "step-2", "step-4"):
        training_client.save_state(name)
    training_client.save_state("step-4", timeout=60)
    assert training_client.list_checkpoints() == ["step-2", "step-4", "step-10"]
    service.close()

    later = FiretitanServiceClient.from_firetitan_config(
        base_model=base_model, lora_rank=4, create_deployment=False, cleanup_trainer_on_close=True
    )
    training_client = later.create_training_client(base_model=base_model, lora_rank=4)
    checkpoint_ref = training_client.resolve_checkpoint_path(
        "step-4",
        source_job_id="previous-job-id",
    )
    training_client.load_state_with_optimizer(checkpoint_ref).result()
    later.close()


def test_blocks_of_later_calls_say_what_to_do(training_client: Any) -> None:
    with pytest.raises(NotImplementedError, match="save_state and load_state"):
        training_client.load_adapter("gs://my-bucket/adapters/run-42")


def test_the_same_blocks_in_a_running_loop(base_model: str, datums: list[tinker.Datum]) -> None:
    """What a script with `asyncio.run` writes, in both generations of tinker's words."""

    async def main() -> None:
        async with make_service(base_model, 4) as service:
            training_client = await service.create_training_client_async(base_model, 4)
            passes = [training_client.forward_backward(datums, "cross_entropy") for _ in range(40)]
            step = await training_client.optim_step_async(tinker.AdamParams(learning_rate=1e-3))
            await asyncio.gather(*passes)
            assert (await step).metrics["step"] == 1
            saved = await (await training_client.save_weights_for_sampler_async("a"))
            sampler = await service.create_sampling_client(model_path=saved.path)
            params = tinker.SamplingParams(max_tokens=4)
            prompt = tinker.ModelInput.from_ints([72])
            answers = await asyncio.gather(
                *[sampler.sample_async(prompt, 2, params) for _ in range(6)]
            )
            assert {one.snapshot for one in answers} == {saved.path}
            pinned = await training_client.save_weights_and_get_sampling_client_async("b")
            assert (await pinned.sample_async(prompt, 1, params)).snapshot.startswith("b-")

    asyncio.run(main())
