"""Deployments of several samplers, through the raw stubs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from firetitan.v1 import deployment_pb2, deployment_service_pb2, sampling_service_pb2

from support.stubs import LaneClient, Stubs

ACTIVE = deployment_pb2.Deployment.STATE_ACTIVE


def deployment(stubs: Stubs) -> deployment_pb2.Deployment:
    """`deployments/d` as it stands."""
    request = deployment_service_pb2.GetDeploymentRequest(name="deployments/d")
    return stubs.retry(stubs.deployments.GetDeployment, request).deployment


def scale(stubs: Stubs, replicas: int) -> deployment_pb2.Deployment:
    """Scale `deployments/d`."""
    request = deployment_service_pb2.ScaleDeploymentRequest(name="deployments/d", replicas=replicas)
    return stubs.retry(stubs.deployments.ScaleDeployment, request).deployment


def until_ready(stubs: Stubs, replicas: int, *, other_than: int = 0) -> list[int]:
    """Wait until so many samplers serve; returns their process ids."""
    deadline = time.monotonic() + 60
    while True:
        found = deployment(stubs)
        pids = [one.pid for one in found.workers if one.state == ACTIVE]
        if len(pids) == found.ready_replicas == replicas and other_than not in pids:
            return pids
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def request(seed: int = 3, max_tokens: int = 8, samples: int = 1) -> Any:
    """A request that gives as many tokens as it may."""
    message = sampling_service_pb2.SampleRequest(deployment="deployments/d", num_samples=samples)
    message.prompt.chunks.add().encoded_text.token_ids = np.array([1, 2], "<i4").tobytes()
    message.params.seed = seed
    message.params.max_tokens = max_tokens
    message.params.ignore_eos = True
    return message


def until_running(stubs: Stubs, least: int) -> None:
    """Wait until each sampler works on something, and all together on so many requests."""
    deadline = time.monotonic() + 30
    while True:
        running = [one.running for one in deployment(stubs).workers]
        if all(running) and sum(running) >= least:
            return
        assert time.monotonic() < deadline, running
        time.sleep(0.01)


def begin(stubs: Stubs, count: int, **what: Any) -> list[Any]:
    """Futures of requests that run when this returns, spread over the samplers."""
    before = sum(one.running for one in deployment(stubs).workers)
    calls = [
        stubs.sampling.Sample.future(request(seed, **what), timeout=60) for seed in range(count)
    ]
    deadline = time.monotonic() + 30
    while sum(one.running for one in deployment(stubs).workers) < before + count:
        assert time.monotonic() < deadline, deployment(stubs)
        assert not any(call.done() for call in calls), "too short to be seen"
        time.sleep(0.01)
    return calls


def snapshots(stubs: Stubs, lane: LaneClient, count: int) -> list[str]:
    """A base and deltas on it."""
    names = []
    for number in range(count):
        lane.step()
        names.append(stubs.done(lane.save_snapshot(f"step-{number}")).snapshot.name)
    return names
