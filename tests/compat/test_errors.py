"""Which exceptions of Python's the daemon's codes become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
from support.daemon import DaemonProcess
from support.stopping import stopped, worker_of

from firetitan_client import FiretitanServiceClient, TrainingAPIError

pytestmark = pytest.mark.timeout(180)
MakeService = Callable[..., FiretitanServiceClient]


def test_codes(make_service: MakeService, data: list[Any]) -> None:
    policy = make_service(create_deployment=False).create_training_client()
    with pytest.raises(ValueError, match="No data provided"):  # in the call
        policy.forward_backward([], "cross_entropy")
    with pytest.raises(ValueError, match="not one of cross_entropy"):  # the worker's word
        policy.forward_backward(data, "nothing").result()
    with pytest.raises(TrainingAPIError) as missing:
        policy.load_state("never-saved").result()
    assert missing.value.status_code == 404
    assert isinstance(missing.value, KeyError)
    with pytest.raises(RuntimeError, match="no gradients accumulated"):
        policy.optim_step(tinker.AdamParams()).result()
    with pytest.raises(NotImplementedError):
        policy.load_state("s", weights_access_token="t")
    with stopped(worker_of(policy)), pytest.raises(TimeoutError):
        policy.forward(data, "cross_entropy").result(0)


def test_no_daemon(tmp_path: Path) -> None:
    service = FiretitanServiceClient(address=f"unix:{tmp_path}/none.sock")
    with pytest.raises(ConnectionError, match="no daemon at"):
        service.create_training_client("firetitan/toy")


def test_damaged_snapshot(toy_daemon: DaemonProcess, make_service: MakeService) -> None:
    service = make_service()
    policy = service.create_training_client()
    saved = policy.save_weights_for_sampler("damaged").result()
    for path in (toy_daemon.home / "store").rglob("*"):
        if path.is_file() and path.stat().st_size:
            body = bytearray(path.read_bytes())
            body[len(body) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(body)
    with pytest.raises(RuntimeError, match=saved.path) as damaged:
        service.hotload_sampler_snapshot(saved.path)
    assert damaged.value.reason == "CHECKSUM_MISMATCH"  # type: ignore[attr-defined]
