"""The chaos run in small: a tiny model, seconds instead of minutes, the same judgement."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.run import Settings, chaos


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lora_rank", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_what_is_trained_while_processes_die_is_the_same(
    tmp_path: Path, tiny_llama: Path, lora_rank: int
) -> None:
    settings = Settings(
        model=str(tiny_llama),
        lora_rank=lora_rank,
        seed=lora_rank,
        steps=12,
        kills=6,
        interval_s=1.0,
        trainer_gap_s=2.0,
        steps_between=1,
    )
    result = chaos(settings, tmp_path / "chaos")
    assert result.same and not result.void, result
    assert result.trainers > result.kills.count("trainer") >= 2 and result.recoveries, result
