"""Recovery points that are damaged, and workers that die again while commands are replayed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from firetitan.v1 import (
    error_pb2,
    operation_pb2,
    session_pb2,
    system_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from support.daemon import DaemonProcess
from support.stubs import TOY, LaneClient, Stubs, status_reason

pytestmark = pytest.mark.timeout(120)

EVERY_STEP = {"FIRETITAN_RECOVERY_INTERVAL_S": "0", "FIRETITAN_RECOVERY_COST_SHARE": "1000"}
NEVER = {"FIRETITAN_RECOVERY_INTERVAL_S": "1e9"}


def flip(point: Path) -> None:
    largest = max(point.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(content)


def truncate(point: Path) -> None:
    halve(max(point.iterdir(), key=lambda file: file.stat().st_size))


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty_manifest(point: Path) -> None:
    os.truncate(point / "manifest.json", 0)


def remove_file(point: Path) -> None:
    max(point.iterdir(), key=lambda file: file.stat().st_size).unlink()


DAMAGES = [flip, truncate, empty_manifest, remove_file, shutil.rmtree]


class Run:
    """A toy trainer's session on a daemon, one client's lane."""

    def __init__(self, home: Path) -> None:
        self.daemon = DaemonProcess(home)

    def begin(self, environment: dict[str, str]) -> None:
        self.daemon.start(environment)
        self.stubs = Stubs(self.daemon.address)
        self.stubs.create_trainer()
        self.lane = LaneClient(self.stubs, self.stubs.session(), "script")

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.lane.step()

    def restart_daemon(self, environment: dict[str, str]) -> None:
        """Kill the daemon, start another, wait until it has adopted the trainer."""
        self.daemon.kill()
        self.daemon.start(environment)
        LaneClient(self.stubs, self.lane.session, "script")

    @property
    def points(self) -> list[Path]:
        """Published recovery points, oldest first."""
        found = (self.daemon.home / "store" / "points").glob("*-*")
        return sorted(found, key=lambda folder: int(folder.name.partition("-")[0]))

    def await_points(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while self.stats.points < count:
            assert time.monotonic() < deadline, self.stats
            time.sleep(0.02)

    def await_failed(self) -> None:
        deadline = time.monotonic() + 30
        request = trainer_service_pb2.GetTrainerRequest(name="trainers/t")
        failed = trainer_pb2.Trainer.STATE_FAILED
        while self.stubs.trainers.GetTrainer(request).trainer.state != failed:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    @property
    def stats(self) -> system_service_pb2.SessionRecovery:
        request = system_service_pb2.GetSystemInfoRequest()
        return self.stubs.retry(self.stubs.system.GetSystemInfo, request).recoveries[0]

    def kill_trainer(self) -> None:
        (pid,) = self.daemon.worker_pids()
        os.kill(pid, signal.SIGKILL)

    def send_and_kill_trainer(self) -> list[operation_pb2.Operation]:
        """A step that is accepted and not run: the trainer is stopped before, dead after."""
        (pid,) = self.daemon.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        sent = [self.lane.forward_backward(), self.lane.optim_step()]
        os.kill(pid, signal.SIGKILL)
        return sent

    def send_and_lose_power(self) -> operation_pb2.Operation:
        """A command that is accepted and not run; then everything is dead."""
        (pid,) = self.daemon.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        sent = self.lane.forward_backward()
        self.daemon.kill()
        os.kill(pid, signal.SIGKILL)
        return sent

    def payload(self, seq: int) -> Path:
        """Where a command waits, or is kept for a replay."""
        spool = self.daemon.home / "spool"
        told = f"{self.lane.client_id}-{seq}".encode()
        (found,) = [one for one in spool.iterdir() if told in one.read_bytes()]
        return found

    def end(self) -> str:
        """Digest of the state after what was sent."""
        return str(self.stubs.done(self.lane.save_state("end")).checkpoint.digest)

    def close(self) -> None:
        if hasattr(self, "stubs"):
            self.stubs.channel.close()
        self.daemon.stop()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "home")
    yield run
    run.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "home")
    try:
        run.begin(NEVER)
        run.steps(4)
        return run.end()
    finally:
        run.close()


def two_points(run: Run) -> list[Path]:
    """Three steps, the last two points behind the first and the second."""
    run.begin(EVERY_STEP)
    for count in (1, 2):
        run.steps(1)
        run.await_points(count)
    run.restart_daemon(NEVER)
    run.steps(1)
    assert len(run.points) == 2
    return run.points


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_behind_a_damaged_point_the_older_one_is_loaded(
    run: Run, undisturbed: str, damage: Callable[[Path], None]
) -> None:
    _, newer = two_points(run)
    damage(newer)
    run.kill_trainer()
    run.steps(1)
    assert run.end() == undisturbed
    assert run.stats.replayed == 4  # two steps of two commands
    assert "recovery point is damaged" in run.daemon.log


def test_behind_the_only_point_that_is_damaged_the_first_weights_are(
    run: Run, undisturbed: str
) -> None:
    run.begin(EVERY_STEP)
    run.steps(1)
    run.await_points(1)
    run.restart_daemon(NEVER)
    run.steps(2)
    flip(run.points[0])
    run.kill_trainer()
    run.steps(1)
    assert run.end() == undisturbed
    assert run.stats.replayed == 6


def test_with_every_point_damaged_the_loss_is_told_exactly(run: Run) -> None:
    points = two_points(run)
    saved = run.stubs.done(run.lane.save_state("good")).checkpoint
    run.steps(1)
    run.stubs.done(run.lane.forward_backward())
    for point in points:
        flip(point)
    sent = run.send_and_kill_trainer()
    losses = [loss_of(run.stubs.wait(one.name)) for one in sent]
    for loss in losses:
        assert (loss.restored_step, loss.lost_steps, loss.lost_backwards) == (3, 1, 1)
        assert loss.restored_from == saved.name
        assert list(loss.lost_operations) == [one.name for one in sent]
        assert "SIGKILL" in loss.cause and "no replay: " in loss.cause
        assert points[1].name in loss.cause and "good" in loss.hint
    assert "trainers/t" in losses[0].session
    # The way out that the hint names.
    run.await_failed()
    run.stubs.create_trainer()
    again = LaneClient(run.stubs, run.stubs.session())
    assert run.stubs.done(again.load_state(saved.name)).load.step == 3
    assert again.step().optim_step.metrics["step"] == 4


@pytest.mark.parametrize("damage", [halve, os.unlink])
def test_a_replay_that_lacks_a_payload_is_a_loss_that_names_it(
    run: Run, damage: Callable[[Path], None]
) -> None:
    """What a loss of power may leave: all processes are dead, not all of the spool is there."""
    run.begin(NEVER)
    run.steps(1)
    saved = run.stubs.done(run.lane.save_state("good")).checkpoint
    run.steps(1)
    sent = run.send_and_lose_power()
    lost = run.payload(2)
    damage(lost)
    run.daemon.start(NEVER)
    loss = loss_of(run.stubs.wait(sent.name))
    assert (loss.restored_step, loss.lost_steps, loss.lost_backwards) == (1, 1, 0)
    assert loss.restored_from == saved.name and list(loss.lost_operations) == [sent.name]
    assert "failed in the replay" in loss.cause and lost.name in loss.cause


@pytest.mark.parametrize("damage", [halve, os.unlink])
def test_a_command_whose_payload_is_lost_fails_and_the_session_goes_on(
    run: Run, undisturbed: str, damage: Callable[[Path], None]
) -> None:
    run.begin(NEVER)
    run.steps(3)
    sent = run.send_and_lose_power()
    lost = run.payload(7)
    damage(lost)
    run.daemon.start(NEVER)
    failed = run.stubs.wait(sent.name)
    assert status_reason(failed.error) == "CHECKSUM_MISMATCH"
    assert lost.name in failed.error.message
    run.lane.seen_failure = failed.seq
    run.steps(1)
    assert run.end() == undisturbed


def loss_of(operation: operation_pb2.Operation) -> error_pb2.SessionLoss:
    assert status_reason(operation.error) == "SESSION_LOSS"
    loss = error_pb2.SessionLoss()
    assert any(detail.Unpack(loss) for detail in operation.error.details)
    return loss


def test_a_worker_that_dies_while_it_replays_is_replaced_too(run: Run, undisturbed: str) -> None:
    # In the fourth command of a process, once in this home; at first it counts as done.
    marker = run.daemon.home / "failpoint-worker.admitted"
    run.daemon.home.mkdir()
    marker.touch()
    run.begin({**NEVER, "FIRETITAN_FAILPOINTS": "worker.admitted=3*off->kill_once"})
    run.steps(3)
    marker.unlink()
    run.kill_trainer()
    run.steps(1)
    assert marker.exists()
    assert run.end() == undisturbed
    assert run.stats.replayed == 3 + 6


def test_a_command_that_ends_two_workers_in_the_replay_is_a_loss(run: Run) -> None:
    run.begin(NEVER)
    run.steps(2)
    run.restart_daemon({**NEVER, "FIRETITAN_FAILPOINTS": "worker.admitted=2*off->kill"})
    sent = run.send_and_kill_trainer()
    loss = loss_of(run.stubs.wait(sent[0].name))
    assert (loss.restored_step, loss.lost_steps, loss.lost_backwards) == (0, 2, 0)
    assert not loss.restored_from
    assert "ForwardBackward" in loss.cause and "ended the worker twice" in loss.cause
    run.await_failed()
    assert run.daemon.worker_pids() == []


def test_of_several_adapters_none_stays_with_a_worker_that_died_in_between(
    tmp_path: Path,
) -> None:
    def digests(home: Path, deaths: bool) -> list[str]:
        daemon = DaemonProcess(home)
        marker = home / "failpoint-worker.admitted"
        home.mkdir()
        marker.touch()
        # A new worker dies in its fifth command: it has replayed one session's, not the other's.
        daemon.start({**NEVER, "FIRETITAN_FAILPOINTS": "worker.admitted=4*off->kill_once"})
        try:
            stubs = Stubs(daemon.address)
            stubs.create_trainer(base_model=TOY, max_lora_rank=8)
            lanes = [LaneClient(stubs, adapter(stubs, rank), "script") for rank in (2, 4)]
            for lane in lanes * 2:
                lane.step()
            if deaths:
                marker.unlink()
                (pid,) = daemon.worker_pids()
                os.kill(pid, signal.SIGKILL)
            # The second's first: the hand's kill may count as a death in the command sent now.
            for lane in reversed(lanes):
                lane.step()
            assert marker.exists()
            saved = [stubs.done(lane.save_state("end")).checkpoint.digest for lane in lanes]
            stubs.channel.close()
            return saved
        finally:
            daemon.stop()

    assert digests(tmp_path / "a", True) == digests(tmp_path / "b", False)


def adapter(stubs: Stubs, rank: int) -> str:
    """A session on the trainer, with an adapter of its own."""
    request = training_service_pb2.CreateSessionRequest(
        trainer="trainers/t",
        lora=session_pb2.LoraConfig(rank=rank),
        seed=rank,
        request_id=f"adapter-{rank}",
    )
    return str(stubs.retry(stubs.training.CreateSession, request).session.name)
