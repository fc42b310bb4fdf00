"""Every training call, on a real daemon: losses on a real model, the rest on the toy."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.stopping import stopped, worker_of

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    GradAccNormalization,
    GradNormMetricsMode,
    compute_lr,
    default_constant_schedule,
)

pytestmark = pytest.mark.timeout(180)
MakeService = Callable[..., FiretitanServiceClient]
ADAM = tinker.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def llama(toy_daemon: DaemonProcess, tiny_llama: Path) -> Iterator[FiretitanTrainingClient]:
    with FiretitanServiceClient.from_firetitan_config(
        address=toy_daemon.address, base_model=str(tiny_llama), lora_rank=4, create_deployment=False
    ) as service:
        yield service.create_training_client()


@pytest.fixture
def policy(make_service: MakeService) -> FiretitanTrainingClient:
    return make_service(create_deployment=False).create_training_client()


def test_the_likeliest_tokens_of_a_forward(llama: FiretitanTrainingClient) -> None:
    """All of them are a distribution; some of them are its head, scored as targets are."""
    data = ragged_data(seed=1, count=3)
    everything = llama.forward(data, "cross_entropy", {"top_k": 272}).result()
    plain = llama.forward(data, "cross_entropy").result()
    assert everything.metrics == plain.metrics
    some = llama.forward(data, "cross_entropy", {"top_k": 5}).result().loss_fn_outputs
    for datum, whole, few, scored in zip(
        data, everything.loss_fn_outputs, some, plain.loss_fn_outputs, strict=True
    ):
        length = datum.model_input.length
        logprobs, ids = whole["top_k_logprobs"].to_numpy(), whole["top_k_indices"].to_numpy()
        assert whole["top_k_indices"].dtype == "int64" and ids.shape == (length, 272)
        assert (np.sort(ids, 1) == np.arange(272)).all() and (np.diff(logprobs, axis=1) <= 0).all()
        np.testing.assert_allclose(np.exp(logprobs).sum(1), 1.0, rtol=1e-5)
        assert few["top_k_indices"].to_numpy().tolist() == ids[:, :5].tolist()
        assert few["top_k_logprobs"].to_numpy().tolist() == logprobs[:, :5].tolist()
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        of_targets = logprobs[ids == targets[:, None]]
        np.testing.assert_allclose(scored["logprobs"].to_numpy(), of_targets, rtol=1e-4, atol=1e-5)
        assert sorted(scored) == ["logprobs"]
    for wrong in (0, 1.5, 273, "five"):
        with pytest.raises(ValueError, match="top_k"):
            llama.forward(data, "cross_entropy", {"top_k": wrong}).result()
    for call in (
        lambda: llama.forward([rl_datum()], "ppo", {"top_k": 2}),
        lambda: llama.forward_backward(data, "cross_entropy", {"top_k": 2}),
    ):
        with pytest.raises(ValueError, match="top_k"):
            call().result()


def test_weight_sync(make_service: MakeService) -> None:
    """The deployment serves the weights of that moment; nothing else is kept of them for long."""
    service = make_service(lora_rank=0)
    policy = service.create_training_client()
    sampler = service.create_sampling_client()
    data = ragged_data(seed=1, count=2, vocab_size=64)
    kinds, served = [], []
    for step in (1, 2):
        policy.forward_backward(data, "cross_entropy")
        policy.optim_step(ADAM)
        synced = policy.weight_sync().result()
        assert synced.optimizer_version == step
        assert sorted(synced.metrics) == ["hotload_s", "save_s"]
        answer = sampler.compute_logprobs([1, 2, 3]).result()
        served.append((sampler.sample([1], 1).result().snapshot, answer))
        (row,) = [
            one
            for one in service.list_checkpoints(service.trainer_job_id)
            if one["name"].endswith(f"/{synced.version}")
        ]
        kinds.append(row["checkpointType"].removeprefix("CHECKPOINT_TYPE_"))
        assert "expireTime" in row
        assert served[-1][0] == synced.version
    assert kinds == ["INFERENCE_BASE", "INFERENCE_ARC_V2"]
    assert served[0][1] != served[1][1]
    alone = make_service(create_deployment=False).create_training_client()
    with pytest.raises(NotImplementedError, match="has no deployment"):
        alone.weight_sync()
    assert alone.list_checkpoints() == []


def rl_datum(gap: float = 0.5) -> tinker.Datum:
    """Old logprobs far from the model's, so that the ratios reach the thresholds."""
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={
            "target_tokens": [2, 3, 4, 5],
            "logprobs": [-5.5 + gap, -5.0, -6.0, -5.0],
            "advantages": [0.0, 1.0, -1.0, 2.0],
        },
    )


def expected(name: str, logprobs: Any, datum: tinker.Datum) -> float:
    """The documented formula, over numpy."""
    inputs = {key: value.to_numpy() for key, value in datum.loss_fn_inputs.items()}
    old, gain = inputs["logprobs"].astype(float), inputs["advantages"].astype(float)
    new = np.asarray(logprobs, float)
    ratio = np.exp(new - old)
    if name == "gspo":
        mask = gain != 0
        ratio = np.full_like(new, np.exp((new - old)[mask].mean()))
    low, high = {"cispo": (0, 4), "dapo": (0.8, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4)}.get(
        name, (0.8, 1.2)
    )
    clipped = np.clip(ratio, low, high)
    match name:
        case "importance_sampling":
            terms = ratio * gain
        case "cispo":
            terms = clipped * new * gain
        case "dro":
            terms = new * gain - 0.5 * 0.05 * (gain != 0) * (new - old) ** 2
        case _:
            terms = np.minimum(ratio * gain, clipped * gain)
    return float(-terms.sum())


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "dapo", "gspo"])
def test_builtin_losses(llama: FiretitanTrainingClient, name: str) -> None:
    datum = rl_datum()
    result = llama.forward_backward([datum], name).result()
    (output,) = result.loss_fn_outputs
    logprobs = output["logprobs"].to_numpy()
    assert logprobs.shape == (4,) and logprobs.dtype == np.float32
    # Its terms are of the order of 1, in fp32, and may cancel.
    wanted = pytest.approx(expected(name, logprobs, datum), rel=1e-4, abs=2e-6)
    assert result.metrics["loss:sum"] == wanted
    assert "response_tokens" not in result.metrics
    weighted = llama.forward_backward(ragged_data(seed=1, count=2), "cross_entropy").result()
    assert weighted.metrics["response_tokens"] > 0
    assert llama.optim_step(ADAM).result().metrics["grad_norm"] > 0


def test_cross_entropy_of_candidates(llama: FiretitanTrainingClient) -> None:
    """[N, K]: each candidate with a weight of its own; no weights are ones."""
    targets = np.array([[2, 3], [3, 4], [4, 5]])
    weights = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 0.25]], np.float32)
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    result = llama.forward([datum], "cross_entropy").result()
    logprobs = result.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert result.metrics["loss:sum"] == pytest.approx(-(weights * logprobs).sum(), rel=1e-4)
    plain = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": targets[:, 0]},
    )
    result = llama.forward([plain], "cross_entropy").result()
    logprobs = result.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert result.metrics["loss:sum"] == pytest.approx(-logprobs.sum(), rel=1e-4)


def test_unknown_losses_list_the_known(llama: FiretitanTrainingClient) -> None:
    for name in ("dppo", "reinforce", "PPO"):
        with pytest.raises(ValueError, match=f"{name}.*not one of .*cross_entropy.*ppo"):
            llama.forward([rl_datum()], name).result()


def test_target_logprob_support(llama: FiretitanTrainingClient) -> None:
    with pytest.raises(ValueError, match="target_logprob_support"):
        llama.forward([rl_datum()], "ppo", {"target_logprob_support": "sampling_support"}).result()


def test_bad_options_of_a_custom_loss(policy: FiretitanTrainingClient, data: list[Any]) -> None:
    def loss(_: Any, values: list[Any]) -> Any:
        return sum(value.sum() for value in values), {}

    for options, text in (
        (
            {"output": "logits"},
            "Unsupported output='logits'; expected 'logprobs', 'embedding', or "
            "'cos_similarity_matrix'",
        ),
        ({"pooling": "max"}, "Unsupported pooling='max'; expected 'mean' or 'last'"),
        ({"loss_type_input": "logits"}, "loss_type_input"),
    ):
        with pytest.raises(ValueError) as refused:
            policy.forward_backward_custom(data, loss, **options)
        assert text in str(refused.value)
    assert policy.forward_backward_custom(data, loss).result().metrics["loss:sum"] < 0


def test_every_adam_field_counts(make_service: MakeService, data: list[Any]) -> None:
    """A step with any one field changed ends elsewhere."""
    changes: list[dict[str, float]] = [
        {},
        {"learning_rate": 2e-2},
        {"beta1": 0.5},
        {"beta2": 0.5},
        {"eps": 1.0},
        {"weight_decay": 0.5},
        {"grad_clip_norm": 1e-3},
    ]
    policy = make_service(create_deployment=False).create_training_client()
    policy.save_state("start").result()
    ends = []
    for change in changes:
        policy.load_state("start")
        for _ in range(2):
            policy.forward_backward(data, "cross_entropy")
            policy.optim_step(tinker.AdamParams(**{"learning_rate": 1e-2, "eps": 1e-6, **change}))
        ends.append(policy.forward(data, "cross_entropy").result().metrics["loss:sum"])
    assert len(set(ends)) == len(changes)


def test_normalization(policy: FiretitanTrainingClient, data: list[Any]) -> None:
    def norm(mode: Any) -> float:
        policy.forward_backward(data, "cross_entropy")
        params = tinker.AdamParams(learning_rate=0.0)
        return float(policy.optim_step(params, mode).result().metrics["grad_norm"])

    weights = np.concatenate([one.loss_fn_inputs["weights"].to_numpy() for one in data])
    raw = norm(None)
    assert norm(GradAccNormalization.NONE) == norm("NONE") == raw
    for mode in (GradAccNormalization.NUM_LOSS_TOKENS, "Num_Loss_Tokens"):
        assert norm(mode) == pytest.approx(raw / np.count_nonzero(weights), rel=1e-5)
    assert norm(GradAccNormalization.NUM_SEQUENCES) == pytest.approx(raw / len(data), rel=1e-5)
    with pytest.raises(ValueError, match="Unknown grad_accumulation_normalization"):
        policy.optim_step(ADAM, "mean")


def test_rows_are_counted(llama: FiretitanTrainingClient) -> None:
    """A position with several candidates is one token; none that counts divides by 1."""

    def norm(weights: list[list[float]], mode: GradAccNormalization) -> float:
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={
                "target_tokens": np.array([[2, 3], [3, 4], [4, 5]]),
                "weights": np.array(weights, np.float32),
            },
        )
        llama.forward_backward([datum], "cross_entropy")
        still = tinker.AdamParams(learning_rate=0.0)
        return float(llama.optim_step(still, mode).result().metrics["grad_norm"])

    two_rows = [[1.0, 0.5], [0.0, 0.0], [0.0, 1.0]]
    raw = norm(two_rows, GradAccNormalization.NONE)
    assert norm(two_rows, GradAccNormalization.NUM_LOSS_TOKENS) == pytest.approx(raw / 2, rel=1e-5)
    assert norm([[0.0] * 2] * 3, GradAccNormalization.NUM_LOSS_TOKENS) == 0


def test_gradient_norm_metrics(policy: FiretitanTrainingClient, data: list[Any]) -> None:
    basic, detailed = {"grad_rms"}, {"grad_rms", "grad_norm/unembed", "grad_rms/unembed"}
    modes = {
        None: set(),
        False: set(),
        True: basic,
        "Basic": basic,
        GradNormMetricsMode.OFF: set(),
        GradNormMetricsMode.BASIC: basic,
        GradNormMetricsMode.DETAILED: detailed,
    }
    for step, (mode, more) in enumerate(modes.items(), start=1):
        policy.forward_backward(data, "cross_entropy")
        metrics = policy.optim_step(ADAM, emit_grad_norm_metrics=mode).result().metrics
        assert metrics["step"] == step and metrics["grad_norm"] > 0
        assert set(metrics) == {"step", "grad_norm", *more}
    policy.forward_backward(data, "cross_entropy")
    asking = SimpleNamespace(learning_rate=1e-2, emit_grad_norm_metrics="detailed")
    assert detailed < set(policy.optim_step(asking).result().metrics)
    with pytest.raises(ValueError, match="Unknown emit_grad_norm_metrics 'all'; expected"):
        policy.optim_step(ADAM, emit_grad_norm_metrics="all")


def test_a_tokenizer_is_the_configured_one_or_the_base_models(
    llama: FiretitanTrainingClient, make_service: MakeService, tmp_path: Path
) -> None:
    folder = llama.get_info().model_data.tokenizer_id
    for configured, refusal in (
        (folder, ""),
        (str(tmp_path), "no tokenizer in"),
        (None, "no tokenizer: pass"),  # the toy has none
    ):
        service = make_service(create_deployment=False, tokenizer_model=configured)
        policy = service.create_training_client()
        if refusal:
            with pytest.raises(ValueError, match=refusal) as caught:
                policy.get_tokenizer()
            assert "tokenizer_model= to the service" in str(caught.value)
        else:
            assert policy.get_tokenizer().vocab_size == llama.get_tokenizer().vocab_size


def test_schedules_set_each_steps_rate(policy: FiretitanTrainingClient, data: list[Any]) -> None:
    rate = compute_lr(default_constant_schedule(), 1, 1e-2)
    before = policy.forward(data, "cross_entropy").result().metrics["loss:sum"]
    policy.forward_backward(data, "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=rate)).result()
    assert policy.forward(data, "cross_entropy").result().metrics["loss:sum"] < before


def test_save_state_with_a_timeout(policy: FiretitanTrainingClient) -> None:
    saved = policy.save_state("in-time", timeout=60)
    assert saved.done() and saved.result().path
    with stopped(worker_of(policy)), pytest.raises(TimeoutError, match="it goes on"):
        policy.save_state("late", timeout=0)
    policy.save_state("after", None, 60)
    assert policy.list_checkpoints() == ["after", "in-time", "late"]
    with pytest.raises(ValueError, match="in-time"):
        policy.save_state("in-time", overwrite=False).result()


def test_checkpoint_types(make_service: MakeService) -> None:
    policy = make_service(lora_rank=0, create_deployment=False).create_training_client()
    paths = [
        policy.save_weights_for_sampler(name, checkpoint_type=kind).result().path
        for name, kind in (("first", None), ("second", "Delta"), ("third", "BASE"))
    ]
    assert len(set(paths)) == 3
    for call in (policy.save_weights_for_sampler, policy.save_weights_for_sampler_ext):
        with pytest.raises(
            ValueError, match=r"checkpoint_type must be one of \('base', 'delta', 'merged_base'\)"
        ):
            call("x", checkpoint_type="full")
        with pytest.raises(
            ValueError, match="export_precision requires checkpoint_type='merged_base'"
        ):
            call("x", export_precision="bf16")


def test_sampling_client_of_a_training_client(make_service: MakeService) -> None:
    policy = make_service().create_training_client()
    saved = policy.save_weights_for_sampler("mine").result()
    assert policy.create_sampling_client(saved.path).sample([1], 1).result().snapshot == saved.path

    async def main() -> str:
        sampler = await policy.create_sampling_client_async(SimpleNamespace(path=saved.path))
        return str((await sampler.sample_async([1], 1)).snapshot)

    assert asyncio.run(main()) == saved.path


def test_what_it_is(make_service: MakeService) -> None:
    service = make_service(create_deployment=False, trainer_job_id="told")
    policy = service.create_training_client()
    assert policy.trainer_job_id == policy.model_id == "told"
    assert policy.session_name.startswith("trainers/told/sessions/")
    assert policy.service is service
    info = policy.get_info()
    assert isinstance(info, tinker.types.GetInfoResponse)
    assert (info.model_id, info.is_lora, info.lora_rank) == ("told", True, 4)
    assert info.model_data.model_name == "firetitan/toy"


def test_futures(policy: FiretitanTrainingClient, data: list[Any]) -> None:
    seen: queue.Queue[Any] = queue.Queue()
    future = policy.forward(data, "cross_entropy")
    future.add_done_callback(seen.put)
    wanted = future.result().metrics
    assert future.done() and future.exception() is None
    assert seen.get(timeout=5) is future and seen.empty()
    assert isinstance(future.future(), concurrent.futures.Future)
    with stopped(worker_of(policy)), pytest.raises(TimeoutError, match="it goes on"):
        policy.forward(data, "cross_entropy").result(0)

    async def main() -> None:
        with stopped(worker_of(policy)):
            later = policy.forward(data, "cross_entropy")
            with pytest.raises(TimeoutError):
                await later.result_async(0)
        assert (await later).metrics == wanted
        task = asyncio.create_task(policy.forward(data, "cross_entropy").coroutine())
        assert (await task).metrics == wanted

    asyncio.run(main())
