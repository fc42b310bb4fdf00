"""Processes that hang for a while: SIGSTOP, and SIGCONT afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from firetitan.v1 import trainer_service_pb2

from firetitan_client import FiretitanTrainingClient


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing while the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        # One that is being deleted is killed when it does not end by itself.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def worker_of(policy: FiretitanTrainingClient) -> int:
    """The process that trains a policy."""
    request = trainer_service_pb2.GetTrainerRequest(name=f"trainers/{policy.trainer_job_id}")
    return int(policy.service.stubs.trainers.GetTrainer(request).trainer.worker_pid)
