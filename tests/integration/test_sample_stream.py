"""Streamed samples against a real daemon: by the stubs alone, and by the client."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tinker
from firetitan.v1 import lease_service_pb2, lease_service_pb2_grpc, sampling_service_pb2
from firetitan.v1.deployment_service_pb2 import GetDeploymentRequest
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs, reason

from firetitan_client import (
    FiretitanSamplingClient,
    InvalidArgument,
    SampleChunk,
    SamplingClientClosedError,
    SnapshotNotActive,
)
from firetitan_client.transport import connect

pytestmark = pytest.mark.timeout(180)

SEQUENCES, TOKENS = 3, 40


def stream_request(**params: Any) -> sampling_service_pb2.SampleStreamRequest:
    message = sampling_service_pb2.SampleStreamRequest()
    message.request.deployment = "deployments/d"
    chunk = message.request.prompt.chunks.add()
    chunk.encoded_text.token_ids = np.array([1, 2], dtype="<i4").tobytes()
    message.request.num_samples = SEQUENCES
    settings = {"max_tokens": TOKENS, "ignore_eos": True, "seed": 3, **params}
    for name, value in settings.items():
        setattr(message.request.params, name, value)
    return message


def long_params(max_tokens: int = 8000) -> tinker.SamplingParams:
    return tinker.SamplingParams(max_tokens=max_tokens, seed=5, stop=[])


@pytest.fixture
def stubs(daemon: DaemonProcess) -> Iterator[Stubs]:
    stubs = Stubs(daemon.address)
    stubs.create_deployment()
    yield stubs
    stubs.channel.close()


@pytest.fixture
def sampler(daemon: DaemonProcess, stubs: Stubs) -> FiretitanSamplingClient:
    return FiretitanSamplingClient.create(daemon.address, "d")


def put_together(
    responses: list[sampling_service_pb2.SampleStreamResponse],
) -> list[tuple[bytes, bytes, bytes, int]]:
    """Each sequence's tokens, both logprobs and why it ended; no token is missing or twice."""
    made = [(b"", b"", b"", 0) for _ in range(SEQUENCES)]
    for response in responses:
        for new in response.tokens:
            tokens, sampling, inference, _ = made[new.sequence]
            assert new.first_token == len(tokens) // 4
            made[new.sequence] = (
                tokens + new.token_ids,
                sampling + new.sampling_logprobs,
                inference + new.inference_logprobs,
                new.stop_reason,
            )
    return made


def collect(chunks: list[SampleChunk], count: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in range(count)]
    for chunk in chunks:
        assert chunk.first_token == len(made[chunk.sequence])
        made[chunk.sequence] += chunk.tokens
    return made


def test_a_stream_brings_what_the_whole_answer_holds(stubs: Stubs) -> None:
    # More than one message holds, however late they are taken.
    request = stream_request(max_tokens=2000, temperature=0.7)
    request.request.prompt_logprobs = True
    whole = stubs.sampling.Sample(request.request)
    responses = list(stubs.sampling.SampleStream(request, timeout=60))
    assert responses[0].seed == 3
    assert len(responses) > 3
    wanted = [
        (one.token_ids, one.sampling_logprobs, one.inference_logprobs, one.stop_reason)
        for one in whole.sequences
    ]
    assert put_together(responses) == wanted
    summary = responses[-1].summary
    assert summary.prompt_logprobs == whole.prompt_logprobs
    assert not summary.sequences
    assert {new.snapshot for one in responses for new in one.tokens} == {""}
    assert not any(one.HasField("summary") for one in responses[:-1])


def test_a_stream_goes_on_behind_what_was_received(stubs: Stubs) -> None:
    request = stream_request(max_tokens=4000)
    request.request.params.ClearField("seed")
    responses = []
    call = stubs.sampling.SampleStream(request, timeout=60)
    for response in call:
        responses.append(response)
        if sum(len(new.token_ids) for new in response.tokens) and len(responses) > 2:
            break
    call.cancel()
    request.request.params.seed = responses[0].seed
    wanted = stubs.sampling.Sample(request.request)
    for so_far in put_together(responses):
        request.resume.received.append(len(so_far[0]) // 4)
    assert sum(request.resume.received) > 0
    responses += list(stubs.sampling.SampleStream(request, timeout=60))
    assert [one[0] for one in put_together(responses)] == [
        sequence.token_ids for sequence in wanted.sequences
    ]


def test_a_stream_does_not_go_on_under_other_weights(stubs: Stubs) -> None:
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    saved = stubs.done(lane.save_snapshot("first")).snapshot.name
    stubs.hotload("deployments/d", saved)
    request = stream_request()
    first = list(stubs.sampling.SampleStream(request, timeout=60))
    assert {new.snapshot for one in first for new in one.tokens} == {saved}
    lane.step()
    second = stubs.done(lane.save_snapshot("second")).snapshot.name
    stubs.hotload("deployments/d", second)
    request.resume.snapshot = saved
    request.resume.received[:] = [1] * SEQUENCES
    with pytest.raises(grpc.RpcError) as caught:
        list(stubs.sampling.SampleStream(request, timeout=60))
    assert reason(caught.value) == "SNAPSHOT_NOT_ACTIVE"


def test_refusals_name_the_field(stubs: Stubs) -> None:
    for received, params, field in (
        ([1], {}, "resume.received"),
        ([1, -1, 1], {}, "resume.received"),
        ([0, 0, 0], {"seed": None}, "request.params.seed"),
        ([0, 0, 0], {"max_tokens": 0}, "max_tokens"),
    ):
        request = stream_request()
        request.resume.received.extend(received)
        for name, value in params.items():
            if value is None:
                request.request.params.ClearField(name)
            else:
                setattr(request.request.params, name, value)
        with pytest.raises(grpc.RpcError) as caught:
            list(stubs.sampling.SampleStream(request, timeout=60))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in caught.value.details()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_cancelling_ends_the_sampling(daemon: DaemonProcess, stubs: Stubs) -> None:
    request = stream_request(max_tokens=8000)
    request.request.num_samples = 4096
    call = stubs.sampling.SampleStream(request, timeout=120)
    next(call)
    call.cancel()
    (worker,) = daemon.worker_pids()
    deadline = time.monotonic() + 60
    idle = 0
    while idle < 3:  # sampling all of it would take minutes of the processor
        before = cpu_seconds(worker)
        time.sleep(0.5)
        idle = idle + 1 if cpu_seconds(worker) - before < 0.02 else 0
        assert time.monotonic() < deadline, "the worker still samples"


def test_the_client_iterates(sampler: FiretitanSamplingClient) -> None:
    params = tinker.SamplingParams(max_tokens=TOKENS, seed=3, stop=[])
    whole = sampler.sample([1, 2], 2, params).result()
    stream = sampler.sample_stream([1, 2], 2, params)
    chunks = list(stream)
    assert stream.seed == 3
    assert collect(chunks, 2) == [sequence.tokens for sequence in whole.sequences]
    assert [c.stop_reason for c in chunks if c.stop_reason] == ["length"] * 2
    logprobs = [one for c in chunks if c.sequence == 0 for one in c.sampling_logprobs]
    assert logprobs == whole.sequences[0].logprobs
    assert list(stream) == []
    with pytest.raises(InvalidArgument, match="out of vocabulary"):
        next(sampler.sample_stream([1, 99], 1, params))
    with pytest.raises(ValueError, match="num_samples: is 0"):
        sampler.sample_stream([1, 2], 0, params)


async def test_the_client_iterates_asynchronously_and_stops_early(
    sampler: FiretitanSamplingClient,
) -> None:
    async with sampler.sample_stream([1, 2], 1, long_params()) as stream:
        first = [await anext(stream) for _ in range(3)]
    assert collect(first, 1)[0]
    assert [chunk async for chunk in stream] == []


def test_the_client_goes_on_over_a_restart_of_the_daemon(
    daemon: DaemonProcess, sampler: FiretitanSamplingClient
) -> None:
    wanted = sampler.sample([1, 2], 4, long_params(1500)).result()
    stream = sampler.sample_stream([1, 2], 4, long_params(1500))
    chunks = [next(stream) for _ in range(8)]
    daemon.kill()
    starting = threading.Timer(0.3, daemon.start)
    starting.start()
    chunks += list(stream)
    starting.join()
    assert collect(chunks, 4) == [sequence.tokens for sequence in wanted.sequences]
    assert len([chunk for chunk in chunks if chunk.stop_reason]) == 4


def test_the_client_goes_on_over_a_stop_of_the_daemon(
    daemon: DaemonProcess, sampler: FiretitanSamplingClient
) -> None:
    stream = sampler.sample_stream([1, 2], 64, long_params())
    chunks = [next(stream) for _ in range(8)]
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_exit()
    daemon.start()
    chunks += [next(stream) for _ in range(5_000)]
    stream.close()
    collect(chunks, 64)


def test_the_client_goes_on_over_the_death_of_the_worker(
    daemon: DaemonProcess, sampler: FiretitanSamplingClient
) -> None:
    wanted = sampler.sample([1, 2], 4, long_params(1500)).result()
    stream = sampler.sample_stream([1, 2], 4, long_params(1500))
    chunks = [next(stream) for _ in range(8)]
    (worker,) = daemon.worker_pids()
    os.kill(worker, signal.SIGKILL)
    chunks += list(stream)
    assert collect(chunks, 4) == [sequence.tokens for sequence in wanted.sequences]


def test_the_client_does_not_mix_weights(
    daemon: DaemonProcess, stubs: Stubs, sampler: FiretitanSamplingClient
) -> None:
    """What is left of a stream is not made up by whatever is served after a loss."""
    stubs.create_trainer(rank=2)
    lane = LaneClient(stubs, stubs.session())
    names = []
    for name in ("first", "second"):
        lane.step()
        names.append(stubs.done(lane.save_snapshot(name)).snapshot.name)
    stubs.hotload("deployments/d", names[0])
    stream = sampler.sample_stream([1, 2], 64, long_params())
    next(stream)
    stubs.hotload("deployments/d", names[1])  # what runs ends on the first one
    worker = stubs.deployments.GetDeployment(GetDeploymentRequest(name="deployments/d"))
    os.kill(worker.deployment.worker_pid, signal.SIGKILL)
    with pytest.raises(SnapshotNotActive, match="first"):
        list(stream)


def test_whoever_streams_uses_the_deployment(
    daemon: DaemonProcess, sampler: FiretitanSamplingClient
) -> None:
    """So that nobody's clean-up takes it away meanwhile."""
    stub = lease_service_pb2_grpc.LeaseServiceStub(connect(daemon.address).channel)

    def users() -> list[str]:
        leases = stub.ListLeases(lease_service_pb2.ListLeasesRequest()).leases
        return [one.client_id for one in leases if "deployments/d" in [u.name for u in one.uses]]

    with sampler.sample_stream([1, 2], 1, long_params()) as stream:
        assert users() == []
        next(stream)
        assert len(users()) == 1


def test_closing_waits_for_a_stream_up_to_its_limit(sampler: FiretitanSamplingClient) -> None:
    stream = sampler.sample_stream([1, 2], 1, long_params(200))
    first = next(stream)
    sampler.close()
    assert collect([first, *stream], 1)[0]
    limited = FiretitanSamplingClient(sampler._ready)
    stream = limited.sample_stream([1, 2], 64, long_params())
    next(stream)
    limited.close(drain_timeout_s=0)
    with pytest.raises(SamplingClientClosedError, match="did not end within 0 s"):
        for _ in stream:
            pass
