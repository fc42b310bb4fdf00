"""Loops that use tinker's names alone, with FiretitanServiceClient in place of its service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
from support.daemon import DaemonProcess
from support.data import ragged_data

from firetitan_client import FiretitanServiceClient
from firetitan_client.errors import ClientClosed, FailedPrecondition, NotFound

pytestmark = pytest.mark.timeout(180)
ADAM = tinker.AdamParams(learning_rate=1e-2)
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])
PARAMS = tinker.SamplingParams(max_tokens=4, seed=1)


@pytest.fixture
def service_client(toy_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a loop is handed instead of `tinker.ServiceClient()`."""
    monkeypatch.setenv("FIRETITAN_ADDRESS", toy_daemon.address)
    with FiretitanServiceClient.from_firetitan_config(
        cleanup_trainer_on_close=True, cleanup_deployment_on_close="delete"
    ) as service:
        yield service


def squared(_: Any, logprobs: list[Any]) -> Any:
    loss = sum((one**2).sum() for one in logprobs)
    return loss, {"squared": loss.item()}


def test_a_loop_that_blocks(service_client: Any, tiny_llama: Path) -> None:
    model = str(tiny_llama)
    data = ragged_data(seed=1, count=2, weight=1.0)
    client = service_client.create_lora_training_client(base_model=model, rank=4, seed=3)
    capabilities = service_client.get_server_capabilities()
    assert isinstance(capabilities, tinker.types.GetServerCapabilitiesResponse)
    assert model in [one.model_name for one in capabilities.supported_models]
    assert service_client.get_telemetry() is client.get_telemetry() is None
    tokenizer = client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    assert client.holder is None
    assert client.run_id == client._guaranteed_model_id() == client.get_info().model_id
    assert client.run_name == client.session_name
    losses = []
    for _ in range(3):
        passed = client.forward_backward(data, loss_fn="cross_entropy")
        stepped = client.optim_step(ADAM)
        losses.append(passed.result().metrics["loss:sum"])
        assert stepped.result().metrics
    assert losses[-1] < losses[0]
    result = client.forward_backward_custom(data, squared).result()
    assert result.metrics["squared"] == pytest.approx(result.metrics["loss:sum"])
    client.optim_step(ADAM).result()
    path = client.save_state(name="0001").result().path
    sampler = client.save_weights_and_get_sampling_client(name="0001")
    assert sampler.sample(PROMPT, sampling_params=PARAMS, num_samples=2).result().sequences
    assert sampler.compute_logprobs(PROMPT).result()[0] is None
    later = client.save_weights_and_get_sampling_client_submit()
    assert later.result(60).sample(PROMPT, 1, PARAMS).result().snapshot.startswith("sampler-")
    before = client.forward(data, "cross_entropy").result().metrics["loss:sum"]
    client.unload_model().result()
    with pytest.raises(ClientClosed):
        client.forward(data, "cross_entropy")
    again = service_client.create_training_client_from_state_with_optimizer(path)
    assert again.forward(data, "cross_entropy").result().metrics["loss:sum"] == before


async def test_a_loop_that_awaits(service_client: Any, tiny_llama: Path) -> None:
    """The newer generation: creation is awaited, twins are awaited twice."""
    data = ragged_data(seed=1, count=2, weight=1.0)
    client = await service_client.create_lora_training_client_async(str(tiny_llama), rank=4)
    capabilities = await service_client.get_server_capabilities_async()
    assert capabilities.supported_models
    assert (await client.get_info_async()).lora_rank == 4
    passed = await client.forward_backward_async(data, "cross_entropy")
    stepped = await client.optim_step_async(ADAM)
    assert (await passed).metrics["loss:sum"] > 0
    assert (await stepped).metrics["step"] == 1
    result = await (await client.forward_backward_custom_async(data, squared))
    assert result.metrics["squared"] > 0
    await client.optim_step(ADAM)
    saved = await (await client.save_weights_for_sampler_async("0001"))
    sampler = await service_client.create_sampling_client_async(model_path=saved.path)
    answers = await asyncio.gather(
        *[sampler.sample_async(PROMPT, num_samples=1, sampling_params=PARAMS) for _ in range(3)],
        asyncio.create_task(sampler.sample(PROMPT, 1, PARAMS).coroutine()),
    )
    assert {answer.snapshot for answer in answers} == {saved.path}
    assert (await sampler.compute_logprobs_async(PROMPT))[0] is None
    await (await client.unload_model_async())
    with pytest.raises(ClientClosed):
        client.forward(data, "cross_entropy")


def test_what_the_newest_tinker_asks(service_client: Any) -> None:
    """Arguments and calls that came with tinker 0.30 to 0.38."""
    client = service_client.create_lora_training_client(
        "firetitan/toy", 4, optimizer=SimpleNamespace(type="adamw")
    )
    dimuon = SimpleNamespace(type="dimuon", version=1)
    for call in (
        lambda: service_client.create_lora_training_client("firetitan/toy", optimizer=dimuon),
        lambda: service_client.create_training_client_from_state("s", optimizer=dimuon),
        lambda: service_client.create_sampling_client(record_stability_info=True),
        lambda: client.save_weights_and_get_sampling_client(record_stability_info=True),
    ):
        with pytest.raises(NotImplementedError, match=r"dimuon|stability"):
            call()
    assert service_client.holder is None
    assert service_client.get_console_url().startswith("unix:")
    assert client.get_console_url() == client.session_name
    fixed = client.save_weights_and_get_sampling_client()
    moving = client.save_weights_and_get_sampling_client(kind="inflight")
    client.forward_backward(ragged_data(seed=1, count=2, vocab_size=64), "cross_entropy")
    client.optim_step(optim_params=ADAM)
    saved = client.save_weights_for_sampler("new", user_metadata={"who": "me"}).result().path
    service_client.create_sampling_client(model_path=saved)
    assert fixed.sample(PROMPT, 1, PARAMS).result().snapshot.startswith("sampler-1-")
    assert moving.sample(PROMPT, 1, PARAMS).result().snapshot == saved
    with pytest.raises(ValueError, match="kind: is 'moving'"):
        client.save_weights_and_get_sampling_client(kind="moving")
    rows = service_client.list_checkpoints(client.model_id)
    notes = {one["name"].rpartition("/")[2]: one["userMetadata"] for one in rows}
    assert notes[saved] == {"who": "me"} and {} in notes.values()
    with pytest.raises(ValueError, match="status: is 'done'"):
        service_client.close("done")
    service_client.close("errored", detail="on purpose").result()
    with pytest.raises(RuntimeError, match="closed"):
        service_client.create_sampling_client()


def test_a_traced_loss(service_client: Any) -> None:
    def squared_error(logprobs: Any, weights: Any) -> Any:
        loss = (weights * logprobs**2).sum()
        return loss, {"custom/squared:sum": loss}

    client = service_client.create_lora_training_client("firetitan/toy", 4, seed=3)
    data = ragged_data(seed=1, count=3, vocab_size=64, weight=0.5)
    ranks = {"logprobs": 1, "weights": 1}
    if not hasattr(tinker.ServiceClient, "create_custom_loss"):
        with pytest.raises(NotImplementedError, match=r"0\.36"):
            service_client.create_custom_loss(squared_error, ranks)
        return
    traced = service_client.create_custom_loss(squared_error, ranks).result()
    result = client.forward_backward_custom(data, traced).result()
    assert result.metrics["custom/squared:sum"] == pytest.approx(result.metrics["loss:sum"])
    norm = client.optim_step(tinker.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]

    def plainly(datums: Any, logprobs: list[Any]) -> Any:
        weights = [one.loss_fn_inputs["weights"].to_torch() for one in datums]
        return sum((w * p**2).sum() for w, p in zip(weights, logprobs, strict=True)), {}

    client.forward_backward_custom(data, plainly).result()
    again = client.optim_step(tinker.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    assert norm == again > 0
    bare = tinker.Datum(model_input=PROMPT, loss_fn_inputs={"target_tokens": [2, 3, 4]})
    with pytest.raises(ValueError, match="weights"):
        client.forward_backward_custom([bare], traced)


def test_runs_and_checkpoints(service_client: Any) -> None:
    client = service_client.create_lora_training_client("firetitan/toy", rank=4)
    state = client.save_state("step-1", user_metadata={"who": "me"}).result()
    snapshot = client.save_weights_for_sampler("step-1", ttl_seconds=3600).result()
    rest = service_client.create_rest_client()
    run_id = client.model_id
    run = rest.get_training_run(run_id).result()
    assert isinstance(run, tinker.types.TrainingRun)
    assert (run.training_run_id, run.base_model) == (run_id, "firetitan/toy")
    assert (run.is_lora, run.lora_rank, run.corrupted) == (True, 4, False)
    saved = rest.list_checkpoints(run_id).result().checkpoints
    assert [one.checkpoint_id for one in saved] == [
        "weights/step-1",
        f"sampler_weights/{snapshot.path}",
    ]
    assert [one.checkpoint_type for one in saved] == ["training", "sampler"]
    assert saved[0].tinker_path == f"tinker://{run_id}/weights/step-1"
    assert run.last_checkpoint == saved[0] and run.last_sampler_checkpoint == saved[1]
    assert all(one.size_bytes > 0 for one in saved)
    expires = [getattr(one, "expires_at", None) is not None for one in saved]
    assert expires in ([False, True], [False, False])  # older tinkers have no such field
    runs = rest.list_training_runs(limit=1).result()
    assert len(runs.training_runs) == 1 and runs.cursor.total_count >= 1
    everything = rest.list_user_checkpoints().result()
    assert {one.tinker_path for one in saved} <= {one.tinker_path for one in everything.checkpoints}
    assert rest.get_training_run_by_tinker_path(saved[0].tinker_path).result() == run
    info = rest.get_weights_info_by_tinker_path(saved[0].tinker_path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == ("firetitan/toy", True, 4)
    assert rest.get_server_capabilities().result() == service_client.get_server_capabilities()
    assert rest.get_telemetry() is None

    # Its paths are good for loading and serving.
    client.load_state(saved[0].tinker_path).result()
    sampler = service_client.create_sampling_client(model_path=saved[1].tinker_path)
    assert sampler.sample(PROMPT, 1, PARAMS).result().snapshot == snapshot.path
    with pytest.raises(FailedPrecondition):
        rest.delete_checkpoint_from_tinker_path(saved[1].tinker_path).result()
    rest.delete_checkpoint(run_id, "weights/step-1").result()
    assert state.path and client.list_checkpoints() == []

    for call in (
        lambda: rest.get_training_run("never").result(),
        lambda: rest.delete_checkpoint(run_id, "weights/never").result(),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(ValueError, match="tinker_path"):
        rest.get_training_run_by_tinker_path("tinker://x/y")
    with pytest.raises(ValueError, match="checkpoint_id"):
        rest.delete_checkpoint(run_id, "step-1").result()
    with pytest.raises(NotImplementedError, match="whoami has no meaning"):
        rest.whoami()
    with pytest.raises(AttributeError):
        _ = rest.nothing_of_the_kind


async def test_runs_in_a_loop(service_client: Any) -> None:
    client = await service_client.create_lora_training_client_async("firetitan/toy", rank=4)
    await (await client.save_state_async("s"))
    rest = service_client.create_rest_client()
    (saved,) = (await rest.list_checkpoints_async(client.model_id)).checkpoints
    run = await rest.get_training_run_async(client.model_id)
    assert run == await rest.get_training_run_by_tinker_path_async(saved.tinker_path)
    assert run in (await rest.list_training_runs_async()).training_runs
    assert saved in (await rest.list_user_checkpoints_async()).checkpoints
    assert (await rest.get_weights_info_by_tinker_path_async(saved.tinker_path)).lora_rank == 4
    assert (await rest.get_server_capabilities_async()).supported_models
    await rest.delete_checkpoint_from_tinker_path_async(saved.tinker_path)
    await client.save_state("t")
    await rest.delete_checkpoint_async(client.model_id, "weights/t")
    assert (await rest.list_checkpoints_async(client.model_id)).checkpoints == []
    with pytest.raises(NotImplementedError):
        await rest.get_session_async("s")
