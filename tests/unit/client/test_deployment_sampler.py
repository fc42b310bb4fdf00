"""DeploymentSampler: its own controller, and what failed requests become."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from firetitan_client import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    DeploymentSamplerTimeoutError,
    FiretitanSamplingClient,
    FiretitanSamplingParams,
    FixedConcurrencyController,
    SamplingRequestError,
    errors,
    limited_requests,
)
from firetitan_client.futures import APIFuture
from firetitan_client.server_metrics import ServerMetrics

ADDRESS = "unix:/nobody/listens.sock"


def test_a_sampler_without_a_controller_has_one_of_its_own() -> None:
    first, second = (DeploymentSampler(ADDRESS, "d") for _ in range(2))
    assert isinstance(first.concurrency_controller, AdaptiveConcurrencyController)
    assert first.concurrency_controller is not second.concurrency_controller
    given = FixedConcurrencyController(3)
    assert DeploymentSampler(ADDRESS, "d", None, None, given).concurrency_controller is given
    with pytest.warns(DeprecationWarning, match="FixedConcurrencyController"):
        old = DeploymentSampler(ADDRESS, "d", max_concurrency=5)
    assert old.concurrency_controller.window_size == 5


class Recording(FixedConcurrencyController):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(1)
        self.released: list[ServerMetrics | None] = []
        self.given_up: list[ServerMetrics] = []

    def release(self, metrics: ServerMetrics | None = None) -> None:
        self.released.append(metrics)
        super().release(metrics)

    def note_retry_exhausted(self, metrics: ServerMetrics) -> None:
        self.given_up.append(metrics)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (errors.Unavailable("gone"), SamplingRequestError, 503),
        (errors.Busy("full"), SamplingRequestError, 429),
        (
            errors.Unavailable("late", reason="DEADLINE_EXCEEDED"),
            DeploymentSamplerTimeoutError,
            504,
        ),
        (errors.DaemonNotRunning("none"), errors.DaemonNotRunning, 503),
        (errors.InvalidArgument("bad"), errors.InvalidArgument, 400),
    ],
)
def test_what_a_failed_request_becomes(
    monkeypatch: pytest.MonkeyPatch,
    error: errors.FiretitanError,
    kind: type[errors.FiretitanError],
    status: int,
) -> None:
    async def send(*_: Any) -> None:
        raise error

    monkeypatch.setattr(limited_requests, "send", send)
    controller = Recording()
    sampler = DeploymentSampler(ADDRESS, "d", concurrency_controller=controller)
    with pytest.raises(kind) as failed:
        asyncio.run(sampler.sample_with_prompt_tokens([1]))
    assert type(failed.value) is kind
    assert failed.value.status_code == status
    assert failed.value.reason == error.reason
    assert str(error) in str(failed.value)
    assert [one.http_status_code for one in controller.released if one] == [error.status_code]
    assert controller.given_up == controller.released
    # The place was given back.
    asyncio.run(asyncio.wait_for(controller.acquire(), 1))


def test_a_sampling_mask_is_refused() -> None:
    client = FiretitanSamplingClient.create(ADDRESS, "d")
    with pytest.raises(NotImplementedError, match="sampling_mask"):
        client.sample([1], 1, FiretitanSamplingParams(max_tokens=1, sampling_mask=[1]))


def test_a_sampling_client_makes_another_sampler_in_the_place_of_a_closed_one() -> None:
    client = FiretitanSamplingClient(APIFuture("ready"))
    first = client.deployment_sampler
    assert client.deployment_sampler is first
    first.close()
    assert client.deployment_sampler is not first
