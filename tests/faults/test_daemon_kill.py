"""`kill -9` of the daemon at every place on a command's way: nothing lost, nothing twice.

Each run sends the same commands from two lanes, many at a time, while the daemon dies at a place
drawn from a seed and is started again. Every operation must end well, the steps must be those
acknowledged, and the weights and the optimizer must be bitwise those of an undisturbed run.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from firetitan.v1 import deployment_pb2, operation_pb2, operation_service_pb2, trainer_pb2
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

from firetitan_daemon.core.failpoints import NAMES

pytestmark = pytest.mark.timeout(120)

STEPS = 4
COMMAND_PLACES = [name for name in NAMES if name.startswith("commands.")]
# Every place once, then more of them at other moments.
SEEDS = list(range(len(COMMAND_PLACES) + 5))


def place(seed: int) -> str:
    """A place and the moment the daemon dies there."""
    generator = random.Random(seed)
    name = COMMAND_PLACES[seed % len(COMMAND_PLACES)]
    # `published` is reached by the successful ones alone; all 13 commands of the script are.
    return f"{name}={generator.randrange(10)}*off->kill"


class Script(threading.Thread):
    """A client that sends its commands without waiting, then waits for all of them."""

    def __init__(self, address: str, session: str) -> None:
        super().__init__()
        self.address = address
        self.session = session
        self.ended: list[operation_pb2.Operation] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        stubs = Stubs(self.address)
        try:
            lane = LaneClient(stubs, self.session, "script")
            sent = []
            for step in range(STEPS):
                sent += [lane.forward_backward(), lane.optim_step()]
                if step == 1:
                    sent += [lane.save_snapshot("half"), lane.save_state("half")]
            sent += [lane.save_snapshot("end"), lane.save_state("end"), lane.forward_backward()]
            self.ended = [stubs.wait(operation.name, 60) for operation in sent]
        except BaseException as error:
            self.failure = error
        finally:
            stubs.channel.close()


def run(home: Path, failpoints: str = "", second_failpoints: str = "") -> dict[str, str]:
    """Run the script, starting the daemon again as often as it dies; returns what it saved."""
    daemon = DaemonProcess(home)
    daemon.start({"FIRETITAN_FAILPOINTS": failpoints})
    try:
        stubs = Stubs(daemon.address)
        assert stubs.create_trainer().trainer.state == trainer_pb2.Trainer.STATE_ACTIVE
        session = stubs.session()
        script = Script(daemon.address, session)
        script.start()
        if failpoints:
            assert daemon.wait_exit(30) == -9, f"{failpoints} was never reached:\n{daemon.log}"
            daemon.start({"FIRETITAN_FAILPOINTS": second_failpoints})
        if second_failpoints:
            assert daemon.wait_exit(30) == -9, f"{second_failpoints} was never reached"
            daemon.start()
        script.join(60)
        assert script.failure is None and not script.is_alive(), script.failure
        for operation in script.ended:
            assert not operation.HasField("error"), operation
        steps = [
            int(one.optim_step.metrics["step"])
            for one in script.ended
            if one.HasField("optim_step")
        ]
        assert steps == list(range(1, STEPS + 1))
        listed = stubs.operations.ListOperations(
            operation_service_pb2.ListOperationsRequest(parent=session)
        ).operations
        assert [one.commit_seq for one in listed] == list(range(1, len(script.ended) + 1))
        with LaneClient(stubs, session, "script").watch() as watch:
            assert [watch.next().name for _ in listed] == [one.name for one in script.ended]
        for kind in ("checkpoints", "snapshots"):
            assert len(list((home / "store" / kind).iterdir())) == 2
        saved = {
            one.checkpoint.name.rpartition("/")[2]: one.checkpoint.digest
            for one in script.ended
            if one.HasField("checkpoint")
        }
        saved |= {
            f"snapshot {one.snapshot.name.rpartition('/')[2][:-9]}": one.snapshot.result_digest
            for one in script.ended
            if one.HasField("snapshot")
        }
        stubs.channel.close()
        return saved
    finally:
        daemon.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    saved = run(tmp_path_factory.mktemp("undisturbed"))
    assert set(saved) == {"half", "end", "snapshot half", "snapshot end"}
    return saved


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_on_the_way_of_a_command(
    tmp_path: Path, undisturbed: dict[str, str], seed: int
) -> None:
    assert run(tmp_path, place(seed)) == undisturbed


@pytest.mark.parametrize("name", ["commands.dispatched", "commands.applied", "commands.published"])
@pytest.mark.parametrize("saves_before", [0, 1])
def test_kill_in_a_save(
    tmp_path: Path, undisturbed: dict[str, str], name: str, saves_before: int
) -> None:
    # The fifth command saves the first snapshot, the sixth the first checkpoint.
    assert run(tmp_path, f"{name}={4 + saves_before}*off->kill") == undisturbed


def test_kill_again_while_the_worker_is_adopted(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    saved = run(tmp_path, "commands.dispatched=5*off->kill", "adopt.adopted=kill")
    assert saved == undisturbed


def test_kill_while_a_trainer_and_a_deployment_are_created(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.start({"FIRETITAN_FAILPOINTS": "create.loaded=kill"})
    try:
        stubs = Stubs(daemon.address)
        ended: list[operation_pb2.Operation] = []
        creation = threading.Thread(target=lambda: ended.append(stubs.create_trainer()))
        creation.start()
        assert daemon.wait_exit(30) == -9
        daemon.start()
        creation.join(40)
        assert [one.trainer.state for one in ended] == [trainer_pb2.Trainer.STATE_ACTIVE]
        assert len(daemon.worker_pids()) == 1
        LaneClient(stubs, stubs.session()).step()
    finally:
        daemon.stop()


def test_kill_in_a_hotload_finishes_it(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.start({"FIRETITAN_FAILPOINTS": "hotload.applied=kill"})
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        lane.step()
        snapshot = stubs.done(lane.save_snapshot("s")).snapshot
        deployment = stubs.create_deployment().deployment
        ended: list[operation_pb2.Operation] = []
        hotload = threading.Thread(
            target=lambda: ended.append(stubs.hotload(deployment.name, snapshot.name))
        )
        hotload.start()
        assert daemon.wait_exit(30) == -9
        daemon.start()
        hotload.join(40)
        assert [one.deployment.active_snapshot for one in ended] == [snapshot.name]
        assert ended[0].deployment.state == deployment_pb2.Deployment.STATE_ACTIVE
        assert stubs.sample().snapshot == snapshot.name
    finally:
        daemon.stop()
