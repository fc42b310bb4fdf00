"""`kill -9` of the trainer, alone or with the daemon: a pause, and the same weights bit for bit.

Each run sends the same commands while the worker dies at a place drawn from a seed. Every operation
must end well, and what is saved must be what an undisturbed run saves.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import error_pb2, session_pb2, system_service_pb2, training_service_pb2
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs, reason, status_reason

pytestmark = pytest.mark.timeout(90)

STEPS = 6
OFTEN = {
    "FIRETITAN_RECOVERY_INTERVAL_S": "0",
    "FIRETITAN_RECOVERY_COST_SHARE": "1000.0",
}
PLACES = [
    "worker.admitted",
    "engine.step",
    "worker.saved",
    "worker.applied",
    "worker.stored",
    "worker.point_copied",
    "worker.point_written",
]
DAEMON_PLACES = [
    "point.begun",
    "point.published",
    "point.made",
    "recovery.launched",
    "recovery.replayed",
    "recovery.restored",
]


def trainer_pid(home: DaemonProcess) -> int:
    (pid,) = home.worker_pids()
    return pid


def guard(daemon: DaemonProcess, done: threading.Event) -> None:
    """Start the daemon again whenever it dies, as a service manager does."""
    while not done.wait(0.02):
        if daemon.process is not None and daemon.process.poll() is not None:
            daemon.start({"FIRETITAN_FAILPOINTS": ""})


def run(
    home: Path,
    environment: dict[str, str],
    kill_at: int = -1,
    both: bool = False,
    idle: bool = False,
    by: int = signal.SIGKILL,
    until: Callable[[system_service_pb2.SessionRecovery], bool] = lambda stats: True,
) -> tuple[dict[str, str], system_service_pb2.SessionRecovery]:
    """Send the commands; before command `kill_at` the trainer, or both, are killed by hand.

    The trainer gets the signal `by`. With `idle` it has finished what it was sent by then. Points
    are made by themselves: it ends once `until` holds too.
    """
    daemon = DaemonProcess(home, {**OFTEN, **environment})
    daemon.start()
    done = threading.Event()
    guardian = threading.Thread(target=guard, args=(daemon, done))
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session(), "script")
        if not both:
            guardian.start()
        sent = []
        for step in range(STEPS):
            calls = [lane.forward_backward, lane.forward_backward, lane.optim_step]
            if step == 2:
                calls += [lambda: lane.save_snapshot("half"), lambda: lane.save_state("half")]
            for call in calls:
                if len(sent) == kill_at:
                    if idle:
                        stubs.done(sent[-1])
                    pid = trainer_pid(daemon)
                    if both:
                        daemon.kill()
                    os.kill(pid, by)
                    if both:
                        daemon.start()
                sent.append(call())
        sent += [lane.save_snapshot("end"), lane.save_state("end")]
        ended = [stubs.wait(one.name, 60) for one in sent]
        failed = [one.error for one in ended if one.HasField("error")]
        assert not failed, failed
        steps = [int(one.optim_step.metrics["step"]) for one in ended if one.HasField("optim_step")]
        assert steps == list(range(1, STEPS + 1))
        saved = {
            one.checkpoint.name.rpartition("/")[2]: one.checkpoint.digest
            for one in ended
            if one.HasField("checkpoint")
        }
        saved |= {
            f"snapshot {one.snapshot.name.rpartition('/')[2][:-9]}": one.snapshot.result_digest
            for one in ended
            if one.HasField("snapshot")
        }
        deadline = time.monotonic() + 20
        # Points are made, and older ones removed, by themselves.
        while len(list((home / "store" / "points").iterdir())) > 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        while not until(stats := recovery_of(stubs)):
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)
        assert len(daemon.worker_pids()) == 1
        stubs.channel.close()
        return saved, stats
    finally:
        done.set()
        if guardian.is_alive():
            guardian.join()
        daemon.stop()


def recovery_of(stubs: Stubs) -> system_service_pb2.SessionRecovery:
    request = system_service_pb2.GetSystemInfoRequest()
    return stubs.retry(stubs.system.GetSystemInfo, request).recoveries[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    saved, stats = run(
        tmp_path_factory.mktemp("undisturbed"), {}, until=lambda stats: stats.points >= 1
    )
    assert set(saved) == {"half", "end", "snapshot half", "snapshot end"}
    assert stats.points >= 1 and not stats.recoveries
    return saved


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("both", [False, True])
def test_killed_by_hand(tmp_path: Path, undisturbed: dict[str, str], seed: int, both: bool) -> None:
    kill_at = random.Random(seed).randrange(1, 3 * STEPS + 2)
    saved, stats = run(tmp_path, {}, kill_at, both, until=lambda stats: stats.recoveries >= 1)
    assert saved == undisturbed
    assert stats.recoveries == 1


@pytest.mark.parametrize(
    ("by", "cause"),
    [
        (signal.SIGSEGV, "killed by SIGSEGV"),
        (signal.SIGABRT, "killed by SIGABRT"),
        # A worker that takes leave although nobody asked it to.
        (signal.SIGTERM, "exited with code 0"),
    ],
)
def test_ended_by_another_signal(
    tmp_path: Path, undisturbed: dict[str, str], by: int, cause: str
) -> None:
    saved, stats = run(tmp_path, {}, kill_at=8, by=by, until=lambda stats: stats.recoveries >= 1)
    assert saved == undisturbed
    assert stats.recoveries == 1
    assert cause in (tmp_path / "test-daemon.log").read_text()


@pytest.mark.parametrize("place", ["engine.step", "worker.applied"])
def test_left_by_os_exit(tmp_path: Path, undisturbed: dict[str, str], place: str) -> None:
    saved, stats = run(
        tmp_path,
        {"FIRETITAN_FAILPOINTS": f"{place}=4*off->exit_once(3)"},
        until=lambda stats: stats.recoveries >= 1,
    )
    assert saved == undisturbed
    assert stats.recoveries == 1
    assert "exited with code 3" in (tmp_path / "test-daemon.log").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_a_place_in_the_worker(
    tmp_path: Path, undisturbed: dict[str, str], place: str
) -> None:
    rare = place in ("worker.saved", "worker.point_copied", "worker.point_written")
    count = random.Random(place).randrange(2 if rare else 6)
    text = f"{place}={count}*off->kill_once"
    # A point's place may not come a second time where points overlap: take the first.
    if place.startswith("worker.point"):
        text = f"{place}=kill_once"
    saved, stats = run(
        tmp_path, {"FIRETITAN_FAILPOINTS": text}, until=lambda stats: stats.recoveries >= 1
    )
    assert saved == undisturbed
    assert stats.recoveries == 1


@pytest.mark.parametrize("place", DAEMON_PLACES)
def test_the_daemon_dies_too(tmp_path: Path, undisturbed: dict[str, str], place: str) -> None:
    # Between a backward pass and its step, so that there is something to replay.
    kill_at = 8 if place.startswith("recovery") else -1
    marker = tmp_path / f"failpoint-{place}"
    saved, _ = run(
        tmp_path,
        {"FIRETITAN_FAILPOINTS": f"{place}=kill_once"},
        kill_at,
        idle=True,
        until=lambda stats: marker.exists(),
    )
    assert saved == undisturbed


@pytest.fixture
def home(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "home")
    yield daemon
    daemon.stop()


def test_a_poison_command_fails_and_the_session_goes_on(home: DaemonProcess) -> None:
    # The fourth command a worker admits; a replay brings each new worker there again.
    home.start({"FIRETITAN_FAILPOINTS": "worker.admitted=3*off->kill->off"})
    stubs = Stubs(home.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    stubs.done(lane.forward_backward())
    poison = stubs.wait(lane.forward_backward().name, 60)
    assert status_reason(poison.error) == "POISON_COMMAND"
    shown = stubs.training.GetSession(
        training_service_pb2.GetSessionRequest(name=lane.session)
    ).session
    assert shown.epoch == 1 and shown.state != session_pb2.Session.STATE_LOST
    stubs.channel.close()


def test_over_budget_the_loss_is_told(home: DaemonProcess) -> None:
    home.start({"FIRETITAN_RECOVERY_MAX_SPOOL_BYTES": "1"})
    stubs = Stubs(home.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    stubs.done(lane.forward_backward())
    held = lane.optim_step(seq=lane.seq + 1)
    os.kill(trainer_pid(home), signal.SIGKILL)
    error = stubs.wait(held.name).error
    assert status_reason(error) == "SESSION_LOSS"
    loss = error_pb2.SessionLoss()
    assert any(detail.Unpack(loss) for detail in error.details)
    assert (loss.restored_step, loss.lost_steps) == (0, 0)
    assert list(loss.lost_operations) == [held.name]
    assert "SIGKILL" in loss.cause and "recovery.max_spool_bytes" in loss.cause
    with pytest.raises(grpc.RpcError) as caught:
        lane.optim_step()
    assert reason(caught.value) == "SESSION_LOSS"
    stubs.channel.close()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_real_model_comes_back_bit_for_bit(tmp_path: Path, tiny_llama: Path, rank: int) -> None:
    def train(home: Path, kill_after: int) -> str:
        daemon = DaemonProcess(home, OFTEN)
        daemon.start()
        try:
            stubs = Stubs(daemon.address)
            stubs.create_trainer(rank=rank, base_model=str(tiny_llama))
            lane = LaneClient(stubs, stubs.session())
            for step in range(5):
                stubs.done(lane.forward_backward())
                if step == kill_after:
                    os.kill(trainer_pid(daemon), signal.SIGKILL)
                    time.sleep(0.05)
                stubs.done(lane.optim_step())
            digest = stubs.done(lane.save_state("end")).checkpoint.digest
            stubs.channel.close()
            return str(digest)
        finally:
            daemon.stop()

    assert train(tmp_path / "a", 3) == train(tmp_path / "b", -1)
