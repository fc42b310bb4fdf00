"""A newer release takes over from an older one, with workers that train on; never the other way.

The older release is a commit of this repository, built as a wheel (`support/releases.py`). Its
workers are adopted and do not notice; clients train through the change. It refuses the ledger of
the newer one and changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import (
    deployment_service_pb2,
    system_service_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from support.daemon import DaemonProcess
from support.history import History
from support.history_client import Training, TrainingClient, run_again
from support.releases import environment, former_release, release_to_come
from support.sizes import NIGHTLY, figure
from support.stubs import TOY, LaneClient, Stubs, reason, status_reason

from firetitan_daemon.handshake import PROTOCOL_VERSION
from firetitan_daemon.store.schema import MIGRATIONS

CLIENTS = 2

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the former release."""
    return former_release(tmp_path_factory.mktemp("former"))


@pytest.fixture(params=["toy", "transformers"])
def base_model(request: pytest.FixtureRequest) -> str:
    if request.param == "toy":
        return TOY
    if not NIGHTLY:
        pytest.skip("a model of transformers: at nightly size")
    return str(request.getfixturevalue("tiny_llama"))


def until_answered(client: TrainingClient) -> None:
    """Wait until a client has an answer again."""
    seen, deadline = len(client.answered), time.monotonic() + 60
    while len(client.answered) == seen:
        assert client.is_alive() and time.monotonic() < deadline, client.failure
        time.sleep(0.01)


def schema_of(home: Path) -> int:
    """Of the ledger, looked at in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        for path in home.glob("state.db*"):
            shutil.copy(path, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / "state.db")) as ledger:
            return int(ledger.execute("PRAGMA user_version").fetchone()[0])


def digests(home: Path) -> dict[str, str]:
    """Of every file of a home but its logs and the lock, which names who held it last."""
    return {
        str(path.relative_to(home)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(home.rglob("*"))
        if path.is_file() and path.suffix != ".log" and path.name != "lock"
    }


def pin(stubs: Stubs, snapshot: str, *, release: bool) -> None:
    """Keep a snapshot loaded, or let it go."""
    request = deployment_service_pb2.PinSnapshotRequest(
        deployment="deployments/d", snapshot=snapshot, holder="test", release=release
    )
    stubs.retry(stubs.deployments.PinSnapshot, request)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_newer_release_goes_on_with_live_workers(
    end: signal.Signals, base_model: str, former: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    older, newer = DaemonProcess(home, environment(former)), DaemonProcess(home)
    rank = 0 if base_model == TOY else 4
    older.start()
    try:
        stubs = Stubs(older.address)
        stubs.create_trainer(base_model=base_model, rank=rank)
        stubs.create_deployment(base_model=base_model)
        session = stubs.session()
        work = Training(older.address, session, tmp_path / "history.jsonl")
        clients = [work.add(f"client-{index}", save_every=8) for index in range(CLIENTS)]
        for client in clients:
            client.start()
        saver = work.add("saver")
        saver.open()
        first = saver.send("SaveSnapshot")[0].snapshot.name
        assert not stubs.hotload("deployments/d", first).HasField("error")
        said = stubs.sample(snapshot=first).sequences[0].token_ids
        pin(stubs, first, release=False)
        workers = sorted(older.worker_pids())
        for client in clients:
            until_answered(client)
        assert older.process is not None
        older.process.send_signal(end)
        older.process.wait(60)
        assert schema_of(home) < len(MIGRATIONS), "the former release has today's schema"
        began = time.monotonic()
        newer.start()
        for client in clients:
            until_answered(client)
        outage_s = time.monotonic() - began
        assert sorted(newer.worker_pids()) == workers and len(workers) == 2
        assert stubs.sample(snapshot=first).sequences[0].token_ids == said
        # Its sampler lacks the call that drops a single snapshot: nobody misses it.
        second = saver.send("SaveSnapshot")[0].snapshot.name
        assert not stubs.hotload("deployments/d", second).HasField("error")
        pin(stubs, first, release=True)
        for client in clients:
            until_answered(client)
        work.stop()
        history = work.judge()
        assert "adapters not dropped" not in newer.log
        digest = saved(stubs, session, "end")
        # What the former release kept for a replay serves a worker of this one.
        (trainer,) = newer.worker_pids("trainer")
        os.kill(trainer, signal.SIGKILL)
        assert saved(stubs, session, "again") == digest
        stubs.channel.close()
        figure("R19", outage_s=round(outage_s, 2), commands=len(history.listed))
        refused_and_unchanged(older, newer)
        newer.start()
        stubs = Stubs(newer.address)
        assert saved(stubs, session, "still-there") == digest
        stubs.channel.close()
    finally:
        older.stop()
        newer.stop()
    assert undisturbed(tmp_path / "undisturbed", base_model, rank, history) == digest


def saved(stubs: Stubs, session: str, name: str) -> str:
    """Save the state; returns its digest."""
    return str(stubs.done(LaneClient(stubs, session, "end").save_state(name)).checkpoint.digest)


def refused_and_unchanged(older: DaemonProcess, newer: DaemonProcess) -> None:
    """Stop the newer daemon and let the older one try."""
    assert newer.process is not None
    newer.process.send_signal(signal.SIGTERM)
    newer.wait_exit()
    assert schema_of(newer.home) == len(MIGRATIONS)
    before, workers = digests(newer.home), sorted(newer.worker_pids())
    older.launch()
    assert older.wait_exit() == 1
    assert f"has schema {len(MIGRATIONS)}, this firetitand knows schemas up to" in older.log
    assert "nothing was changed" in older.log
    assert digests(newer.home) == before
    assert sorted(newer.worker_pids()) == workers


def undisturbed(home: Path, base_model: str, rank: int, history: History) -> str:
    """The digest of a state in which the same commands ran in one process after another."""
    daemon = DaemonProcess(home)
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer(base_model=base_model, rank=rank)
        digest = run_again(stubs, stubs.session(), history)
        stubs.channel.close()
        return digest
    finally:
        daemon.stop()


def test_a_worker_of_a_newer_protocol_is_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    newer = DaemonProcess(home, environment(release_to_come(tmp_path / "release")))
    ours = DaemonProcess(home)
    newer.start()
    try:
        stubs = Stubs(newer.address)
        stubs.create_trainer()
        stubs.create_deployment()
        session = stubs.session()
        LaneClient(stubs, session, "lane").step()
        digest = saved(stubs, session, "before")
        workers = sorted(newer.worker_pids())
        newer.kill()
        ours.start()
        wanted = {"trainers/t", "deployments/d"}
        deadline = time.monotonic() + 20
        while wanted != {
            one.target for one in system_info(stubs).workers if one.state == "unsupported"
        }:
            assert time.monotonic() < deadline, ours.log
            time.sleep(0.1)
        trainer = stubs.trainers.GetTrainer(
            trainer_service_pb2.GetTrainerRequest(name="trainers/t")
        ).trainer
        assert status_reason(trainer.error) == "UNSUPPORTED"
        assert f"speaks worker protocol {PROTOCOL_VERSION + 1}" in trainer.error.message
        with pytest.raises(grpc.RpcError) as caught:
            stubs.training.AttachSession(
                training_service_pb2.AttachSessionRequest(name=session, client_id="lane")
            )
        assert reason(caught.value) == "RECOVERING"
        time.sleep(3)
        assert sorted(newer.worker_pids()) == workers
        ours.kill()
        newer.start()
        assert saved(stubs, session, "after") == digest
        assert sorted(newer.worker_pids()) == workers
        stubs.channel.close()
    finally:
        newer.stop()
        ours.stop()


def system_info(stubs: Stubs) -> system_service_pb2.GetSystemInfoResponse:
    """What the daemon says about itself."""
    return stubs.retry(stubs.system.GetSystemInfo, system_service_pb2.GetSystemInfoRequest())
