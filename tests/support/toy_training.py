"""Training a toy through the client: a service, data, the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import tinker

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient
from support.daemon import DaemonProcess
from support.stubs import TOY

ADAM = tinker.AdamParams(learning_rate=1e-2)


def toy_data(seed: int = 0, count: int = 3, length: int = 6) -> list[tinker.Datum]:
    generator = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        tokens = generator.integers(0, 64, length + 1)
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tokens[1:].astype(np.int64),
                    "weights": np.ones(length, np.float32),
                },
            )
        )
    return data


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    settings = {"base_model": TOY, "lora_rank": 0, "seed": 5, "create_deployment": False}
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, **{**settings, **config}
    )


def loss_of(policy: FiretitanTrainingClient, data: list[tinker.Datum]) -> float:
    return float(policy.forward(data, "cross_entropy").result().metrics["loss:sum"])
