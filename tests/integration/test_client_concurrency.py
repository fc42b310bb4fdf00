"""Concurrency controllers around a real daemon's sampler."""

from __future__ import annotations

import asyncio

import pytest
from support.daemon import DaemonProcess

from firetitan_client import (
    AdaptiveConcurrencyController,
    FiretitanServiceClient,
    FixedConcurrencyController,
)


class WordTokenizer:
    """Each token is its number."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@pytest.mark.timeout(120)
def test_controllers_see_every_request(daemon: DaemonProcess) -> None:
    adaptive = AdaptiveConcurrencyController(initial_window=2, adjustment_interval=0)
    fixed = FixedConcurrencyController(1)
    with FiretitanServiceClient.from_firetitan_config(
        base_model="firetitan/toy", lora_rank=4, deployment_id="serve", address=daemon.address
    ) as service:
        saved = service.create_training_client().save_weights_for_sampler("s").result()
        samplers = [
            service.create_deployment_sampler(
                saved.path, tokenizer=WordTokenizer(), concurrency_controller=controller
            )
            for controller in (adaptive, fixed)
        ]

        async def rollouts() -> int:
            made = await asyncio.gather(
                *(
                    sampler.sample_with_prompt_tokens([1, 2, 3], max_tokens=4)
                    for sampler in samplers
                    for _ in range(6)
                )
            )
            return sum(len(completions) for completions in made)

        # Two loops, one after the other, and the same controllers.
        assert [asyncio.run(rollouts()) for _ in range(2)] == [12, 12]
        measured = samplers[0].drain_metrics()
    summary = adaptive.step_completed()
    assert {(one.http_status_code, one.transport_error) for one in measured} == {(200, False)}
    queued = [one.prefill_queue_duration for one in measured]
    assert len(queued) == 12 and all(one is not None and one >= 0 for one in queued)
    assert summary["requests"] == 12
    assert summary["max_in_flight"] == 2
    assert summary["avg_pq"] == pytest.approx(sum(one or 0 for one in queued) / 12)
    assert summary["window_after"] > 2
    assert adaptive.in_flight == 0
    assert (adaptive.window_size, fixed.window_size) == (summary["window_after"], 1)
