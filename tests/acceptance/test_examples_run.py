"""The examples on a tiny model, LoRA and full-parameter: they learn what it can learn."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import DaemonProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

pytestmark = pytest.mark.timeout(300)

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all of them."""
    process = DaemonProcess(tmp_path_factory.mktemp("examples") / "home")
    process.start()
    yield process
    process.stop()


@pytest.fixture(
    params=[pytest.param(8, id="lora"), pytest.param(0, id="full", marks=pytest.mark.slow)]
)
def run(
    request: pytest.FixtureRequest,
    daemon: DaemonProcess,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs an example's `train` with a service of its own."""
    from firetitan_client import FiretitanServiceClient

    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)

    def train(example: Any, **settings: Any) -> Any:
        with FiretitanServiceClient.from_firetitan_config(
            base_model=str(tiny_llama),
            lora_rank=request.param,
            cleanup_trainer_on_close=True,
            cleanup_deployment_on_close="delete",
        ) as service:
            return example.train(
                service,
                model=str(tiny_llama),
                lora_rank=request.param,
                learning_rate=1e-2,
                **settings,
            )

    return train


def test_preferences_are_learned(run: Run) -> None:
    import dpo

    report = run(dpo, steps=5, batch_size=2)
    assert report.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert report.losses[-1] < 0.1
    assert report.heldout[1] > 0.9 > report.heldout[0]


def test_texts_are_told_apart_by_either_loss(run: Run) -> None:
    import embedding

    built_in = run(embedding, steps=8, batch_size=8)
    assert statistics.mean(built_in.losses[-3:]) < 0.85 * built_in.losses[0]
    ours = run(embedding, steps=2, batch_size=8, custom=True)
    assert ours.losses == pytest.approx(built_in.losses[:2], rel=1e-4)


def test_a_teacher_scores_and_a_student_learns_from_it(run: Run) -> None:
    """A random model hardly reads its system prompt: the student begins next to the teacher."""
    import distillation

    report = run(distillation, steps=2, num_questions=4, max_tokens=8)
    assert len(report.kls) == 2
    assert all(0 < abs(kl) < 0.5 for kl in (*report.kls, *report.heldout))
