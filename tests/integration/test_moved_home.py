"""A home that is reached by another path than before, or was moved."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from firetitan.v1 import (
    checkpoint_service_pb2,
    deployment_service_pb2,
    trainer_service_pb2,
)
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("how", ["by a link", "by another link", "moved"])
def test_what_was_saved_is_loaded_replaced_and_deleted(tmp_path: Path, how: str) -> None:
    real, link = tmp_path / "real" / "home", tmp_path / "link"
    real.parent.mkdir()
    link.symlink_to(real.parent)
    daemon = DaemonProcess(link / "home" if how == "by another link" else real)
    daemon.start()
    pids = []
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        stubs.create_deployment()
        lane = LaneClient(stubs, stubs.session())
        lane.step()
        digest = stubs.done(lane.save_state("kept")).checkpoint.digest
        stubs.done(lane.save_state("replaced"))
        snapshot = stubs.done(lane.save_snapshot("served")).snapshot.name
        assert not stubs.hotload("deployments/d", snapshot).HasField("error")
        answer = stubs.sample().sequences
        lane.step()
        pids = workers(stubs)
        daemon.kill()
        stubs.channel.close()
        if how == "moved":
            home = tmp_path / "elsewhere"
            real.rename(home)
        else:
            home = link / "home" if how == "by a link" else real
        daemon.home = home
        daemon.start()
        stubs = Stubs(daemon.address)
        lane = LaneClient(stubs, lane.session)
        stubs.done(lane.load_state("kept"))
        assert stubs.done(lane.save_state("replaced")).checkpoint.digest == digest
        assert stubs.sample().sequences == answer
        assert not stubs.hotload("deployments/d", snapshot).HasField("error")
        assert workers(stubs) == pids
        assert sorted(DaemonProcess(tmp_path).worker_pids()) == sorted(pids)
        saved = home / "store" / "checkpoints"
        assert len(list(saved.glob("replaced-*"))) == 1
        name = f"{lane.session}/checkpoints/replaced"
        stubs.checkpoints.DeleteCheckpoint(
            checkpoint_service_pb2.DeleteCheckpointRequest(name=name)
        )
        assert not list(saved.glob("replaced-*"))
        assert lane.step().optim_step.metrics["step"] == 2
        stubs.channel.close()
    finally:
        daemon.stop()
        for pid in DaemonProcess(tmp_path).worker_pids():
            os.kill(pid, signal.SIGKILL)


def workers(stubs: Stubs) -> list[int]:
    """Process ids of trainer and sampler."""
    trainer = stubs.trainers.GetTrainer(trainer_service_pb2.GetTrainerRequest(name="trainers/t"))
    deployment = stubs.deployments.GetDeployment(
        deployment_service_pb2.GetDeploymentRequest(name="deployments/d")
    )
    return [trainer.trainer.worker_pid, deployment.deployment.worker_pid]
