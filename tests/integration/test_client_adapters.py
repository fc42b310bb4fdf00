"""Many adapters on one trainer (`max_lora_rank`), against a real daemon."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tinker
from firetitan.v1 import trainer_pb2, trainer_service_pb2
from support.daemon import DaemonProcess
from support.data import ragged_data

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient

pytestmark = pytest.mark.timeout(300)

TOY = "firetitan/toy"
ADAM = tinker.AdamParams(learning_rate=5e-2)
DATA = ragged_data(seed=1, count=3, vocab_size=64)
SETTINGS: list[dict[str, Any]] = [
    {"lora_rank": 4, "seed": 1},
    {"lora_rank": 4, "seed": 1},
    {"lora_rank": 2, "seed": 2, "lora_alpha": 8},
]


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    settings = {"base_model": TOY, "max_lora_rank": 8, "create_deployment": False}
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, **{**settings, **config}
    )


def logprobs(client: FiretitanTrainingClient) -> list[list[float]]:
    outputs = client.forward(DATA, "cross_entropy").result().loss_fn_outputs
    return [output["logprobs"].tolist() for output in outputs]


def step(client: FiretitanTrainingClient, seed: int) -> None:
    client.forward_backward(ragged_data(seed=seed, count=2, vocab_size=64), "cross_entropy")
    client.optim_step(ADAM)


def trainers(service: FiretitanServiceClient) -> list[trainer_pb2.Trainer]:
    listed = service.stubs.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest())
    return list(listed.trainers)


def refused(call: Any, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("real", [False, True], ids=["toy", "hf"])
def test_each_adapter_comes_to_what_it_comes_to_alone(
    daemon: DaemonProcess, tiny_llama: Path, real: bool
) -> None:
    model = str(tiny_llama) if real else TOY
    settings = SETTINGS[1:] if real else SETTINGS
    with make_service(daemon, base_model=model) as service:
        clients = [service.create_training_client(model, **one) for one in settings]
        for number in range(3):
            for index, client in enumerate(clients):
                step(client, 10 * index + number)
        together = [logprobs(client) for client in clients]
        assert len({client.session_name for client in clients}) == len(clients)
        (trainer,) = trainers(service)
        assert (trainer.max_lora_rank, trainer.lora_rank, trainer.session) == (8, 0, "")
    for index, one in enumerate(settings):
        alone = make_service(
            daemon,
            base_model=model,
            max_lora_rank=None,
            lora_rank=one["lora_rank"],
            cleanup_trainer_on_close=True,
        )
        with alone:
            client = alone.create_training_client(**one)
            for number in range(3):
                step(client, 10 * index + number)
            assert logprobs(client) == together[index]


def test_references_and_bases_beside_the_adapters(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        base = service.create_base_training_client(TOY)
        before = logprobs(base)
        first = service.create_training_client(lora_rank=4)
        second = service.create_training_client(lora_rank=2)
        own = first.create_base_training_client()
        reference = service.create_reference_client(policy_client=second)
        step(first, 1)
        step(second, 2)
        for frozen in (base, own, reference):
            assert logprobs(frozen) == before
            refused(lambda one=frozen: one.optim_step(ADAM), RuntimeError, "forward()")
        assert logprobs(first) != before != logprobs(second)
        assert own.session_name == first.session_name
        assert reference.session_name == second.session_name
        assert base.session_name not in (first.session_name, second.session_name)
        assert service.create_reference_client(policy_client=second) is reference
        assert service.create_reference_client(policy_client=first) is not reference
        assert service.reference_trainer_job_id is None
        assert len(trainers(service)) == 1
        service.release_references()
        refused(lambda: reference.forward(DATA, "cross_entropy"), RuntimeError, "closed")


def test_a_separate_reference_serves_every_policy(daemon: DaemonProcess) -> None:
    with make_service(daemon, reference_trainer_job_id="frozen") as service:
        first = service.create_training_client(lora_rank=4)
        second = service.create_training_client(lora_rank=2)
        reference = service.create_reference_client(policy_client=first)
        assert service.create_reference_client(policy_client=second) is reference
        assert logprobs(reference) == logprobs(first)
        assert service.reference_trainer_job_id == "frozen"
        assert len(trainers(service)) == 2


def test_what_goes_wrong_is_said_in_the_call(daemon: DaemonProcess) -> None:
    with make_service(daemon, trainer_job_id="many") as service:
        words = ("lora_rank must be between 1 and max_lora_rank=8",)
        for rank in (None, 0, 9):
            refused(lambda r=rank: service.create_training_client(lora_rank=r), ValueError, *words)
        refused(service.create_lora_training_client, ValueError, *words)
        refused(
            lambda: service.create_training_client("other", lora_rank=4), ValueError, "other", TOY
        )
        policy = service.create_training_client(lora_rank=4)
        refused(service.create_reference_client, ValueError, "policy_client")
        refused(
            lambda: service.create_training_client_from_state("x"),
            NotImplementedError,
            "load_state",
        )
        for config, word in (({"lora_rank": 4}, "lora_rank"), ({"lora_alpha": 8}, "lora_alpha")):
            refused(lambda c=config: make_service(daemon, **c), ValueError, "combined", word)
        refused(lambda: make_service(daemon, max_lora_rank=0), ValueError, "max_lora_rank")
        # The daemon says the same to whoever asks it directly.
        with FiretitanServiceClient(address=daemon.address, trainer_job_id="many") as bare:
            refused(lambda: bare.create_training_client(lora_rank=9), ValueError, "lora.rank", "8")
            refused(bare.create_training_client, ValueError, "lora.rank")
        with make_service(daemon, max_lora_rank=4, trainer_job_id="many") as other:
            refused(lambda: other.create_training_client(lora_rank=2), ValueError, "4", "8")
        assert logprobs(policy)


def test_joining_one_of_many(daemon: DaemonProcess) -> None:
    with make_service(daemon, trainer_job_id="many") as service:
        first = service.create_training_client(lora_rank=4)
        second = service.create_training_client(lora_rank=2, lora_alpha=8)
        step(second, 1)
        with FiretitanServiceClient(base_url=service.base_url, address=daemon.address) as bare:
            joined = bare.create_training_client(session=second.session_name)
            assert logprobs(joined) == logprobs(second) != logprobs(first)
            refused(
                lambda: bare.create_training_client(session=second.session_name, lora_alpha=16),
                ValueError,
                "alpha",
            )
            # No session named: another one.
            third = bare.create_training_client(lora_rank=4)
            assert third.session_name not in (first.session_name, second.session_name)


def test_checkpoints_are_each_sessions_own(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        first = service.create_training_client(lora_rank=4)
        second = service.create_training_client(lora_rank=4)
        for number, client in enumerate((first, second)):
            step(client, number)
            client.save_state("same").result()
        ends = [logprobs(client) for client in (first, second)]
        second.save_state("more").result()
        assert (first.list_checkpoints(), second.list_checkpoints()) == (["same"], ["more", "same"])
        for client in (first, second):
            step(client, 5)
            client.load_state_with_optimizer("same")
        assert [logprobs(client) for client in (first, second)] == ends
        third = service.create_training_client(lora_rank=4)
        third.load_state(f"{second.session_name}/checkpoints/same")
        assert logprobs(third) == ends[1]


def test_unload_model_frees_one_and_leaves_the_others(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        first = service.create_training_client(lora_rank=4)
        second = service.create_training_client(lora_rank=2)
        step(first, 1)
        pending = first.optim_step(ADAM)  # fails: nothing was accumulated
        last = second.forward(DATA, "cross_entropy")
        second.unload_model().result()
        assert last.result().loss_fn_outputs
        refused(lambda: second.forward(DATA, "cross_entropy"), RuntimeError, "closed")
        refused(lambda: service.create_training_client(session=second.session_name), RuntimeError)
        refused(pending.result, RuntimeError, "no gradients")
        assert logprobs(first)
    with make_service(daemon, max_lora_rank=None, lora_rank=4) as service:
        policy = service.create_training_client()
        refused(policy.create_base_training_client().unload_model, RuntimeError, "forward()")
        step(policy, 1)
        policy.unload_model().result()
        fresh = service.create_training_client(seed=9)
        assert fresh.session_name != policy.session_name
        assert logprobs(fresh)
    with make_service(daemon, max_lora_rank=None, lora_rank=0) as service:
        policy = service.create_training_client()
        refused(policy.unload_model, NotImplementedError, "cleanup_trainer_on_close")
        assert logprobs(policy)


def test_all_of_them_survive_worker_and_daemon(daemon: DaemonProcess) -> None:
    ends = []
    for kills in (False, True):
        with make_service(daemon, trainer_job_id=f"many{kills}") as service:
            clients = [service.create_training_client(**one) for one in SETTINGS]
            for number in range(2):
                for index, client in enumerate(clients):
                    step(client, 10 * index + number)
                    client.forward_backward(DATA, "cross_entropy").result()
                if kills and number == 0:
                    pid = trainers(service)[-1].worker_pid
                    os.kill(pid, signal.SIGKILL)
                if kills and number == 1:
                    daemon.kill()
                    daemon.start()
            for client in clients:
                client.optim_step(ADAM)
            ends.append([logprobs(client) for client in clients])
    assert ends[0] == ends[1]


def test_adapters_take_turns_in_a_deployment(daemon: DaemonProcess) -> None:
    with make_service(daemon, create_deployment=True, tokenizer_model=None) as service:
        clients = [service.create_training_client(**one) for one in SETTINGS[1:]]
        prompt = tinker.ModelInput.from_ints([1, 5, 9, 2])
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 5, 9]),
            loss_fn_inputs={"target_tokens": [5, 9, 2]},
        )
        paths = []
        for index, client in enumerate(clients):
            step(client, index)
            paths.append(client.save_weights_for_sampler("s").result().path)
        assert len(set(paths)) == 2
        for client, path in zip(clients, paths, strict=True):
            sampler = service.create_sampling_client(model_path=path)
            served = sampler.compute_logprobs(prompt).result()[1:]
            output = client.forward([datum], "cross_entropy").result()
            assert served == pytest.approx(output.loss_fn_outputs[0]["logprobs"].tolist(), abs=1e-5)
