"""`firetitand doctor`: each state brought about, named with what to do, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from firetitan.v1 import system_service_pb2
from support.daemon import DaemonProcess
from support.stopping import stopped
from support.stubs import LaneClient, Stubs

from firetitan_daemon.doctor import Report, examine
from firetitan_daemon.launch.bundle import Bundle
from firetitan_daemon.places import Places
from firetitan_daemon.store.lock import StateLock

pytestmark = pytest.mark.timeout(120)


def look(daemon: DaemonProcess) -> Report:
    """What doctor finds, in an environment without settings."""
    return examine(Places(daemon.home), {})


def named(report: Report, *words: str) -> str:
    """What to do about the one finding whose subject or text has all of these words."""
    found = [
        one
        for one in report.findings
        if all(word in f"{one.subject}: {one.what}" for word in words)
    ]
    assert len(found) == 1, report.findings
    return found[0].todo


def doctor(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "FIRETITAN_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", "doctor", "--home", str(home), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_is_wrong(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    healthy = doctor(daemon.home)
    assert healthy.returncode == 0, healthy.stdout
    assert healthy.stdout.endswith("nothing is wrong\n")
    told = json.loads(doctor(daemon.home, "--json").stdout)
    assert told["state"] == "running" and told["findings"] == []
    assert {"python", "torch", "transformers", "grpcio", "sqlite", "gpus"} <= set(told["facts"])
    stubs.channel.close()


def test_no_daemon_and_what_one_left(daemon: DaemonProcess, tmp_path: Path) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    stubs.channel.close()
    daemon.kill()
    report = look(daemon)
    assert report.state == "none"
    assert named(report, "no daemon runs on it") == "firetitand serve"
    for left in ("daemon.json", "firetitan.sock"):
        assert "replaces it" in named(report, left, "left over")
    assert "finds it again" in named(report, "goes on without a daemon", "trainers/t")
    dead = doctor(daemon.home)
    assert dead.returncode == 4 and "! " in dead.stdout
    nowhere = examine(Places(tmp_path / "nowhere"), {})
    assert "--home" in named(nowhere, "does not exist")
    other = DaemonProcess(tmp_path / "other")
    other.start()
    try:
        assert str(other.home) in named(look(daemon), str(other.home), "runs on this other home")
        stray = {"FIRETITAN_ADDRESS": other.address}
        assert "unset" in named(examine(Places(daemon.home), stray), "sends clients to")
    finally:
        other.stop()


def test_a_daemon_that_is_stopped(daemon: DaemonProcess) -> None:
    assert daemon.process is not None
    with stopped(daemon.process.pid):
        silent = doctor(daemon.home)
    assert silent.returncode == 5, silent.stdout
    assert f"-> kill -CONT {daemon.process.pid}" in silent.stdout


def test_who_may_enter_and_what_is_set(daemon: DaemonProcess) -> None:
    (daemon.home / "store").chmod(0o755)
    (daemon.home / "config.toml").write_text("[server]\ndrain_timeout = 3\n")
    report = look(daemon)
    assert named(report, "store", "open to other users (mode 755)").startswith("chmod 700")
    named(report, "server.drain_timeout: no such setting")
    assert doctor(daemon.home).returncode == 1


def test_workers_without_a_record_and_of_another_protocol(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    stubs.channel.close()
    workers = daemon.home / "workers"
    (folder,) = workers.iterdir()
    stray = Bundle(workers, "stray")
    lock = stray.lock()
    assert lock is not None
    try:
        for name in ("spec.json", "bootstrap.json"):
            shutil.copy(folder / name, stray.folder / name)
        assert named(look(daemon), "workers/stray", "belongs to no record").startswith("kill ")
        spec = json.loads((stray.folder / "spec.json").read_text())
        key = next(key for key in spec if key.lower().replace("_", "") == "protocolversion")
        (stray.folder / "spec.json").write_text(json.dumps({**spec, key: 99}))
        assert "create it anew" in named(look(daemon), "workers/stray", "speaks protocol 99")
    finally:
        os.close(lock)
    assert not look(daemon).findings


def test_ledgers_that_are_damaged_or_too_new(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    daemon.stop()
    database = daemon.home / "state.db"
    whole = database.read_bytes()
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert "newer firetitan" in named(look(daemon), "has schema 99")
    page = 4096
    database.write_bytes(whole[:page] + b"\xff" * page + whole[2 * page :])
    before = database.read_bytes()
    assert "backup" in named(look(daemon), "state.db", "damaged")
    assert database.read_bytes() == before


def test_a_running_daemon_looks_its_ledger_over(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    daemon.stop()
    database = daemon.home / "state.db"
    with sqlite3.connect(database) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'operations_request'"
        ).fetchone()
    connection.close()
    with database.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    daemon.start()  # which does not read that page
    try:
        report = look(daemon)
        assert report.state == "running" and "backup" in named(report, "damaged")
    finally:
        daemon.stop()


def test_a_ledger_that_somebody_holds_is_left_alone(tmp_path: Path) -> None:
    """Whoever starts or ends writes in it: a copy made meanwhile is of two moments."""
    places = Places(tmp_path / "home")
    places.make()
    places.database.write_bytes(b"\xff" * 8192)
    lock = StateLock(places.lock)
    report = examine(places, {})
    assert report.state == "none"
    assert "it starts or ends" in str(report.findings)
    assert not [one for one in report.findings if one.check == "ledger"]
    lock.release()
    named(examine(places, {}), "state.db", "damaged")


def test_a_daemon_that_starts_while_its_ledger_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path / "home")
    places.make()
    places.database.write_bytes(b"\xff" * 8192)
    copy, locks = shutil.copyfile, []

    def begin(source: Path, target: Path) -> None:
        copy(source, target)
        locks.append(StateLock(places.lock))

    monkeypatch.setattr(shutil, "copyfile", begin)
    report = examine(places, {})
    assert locks and not [one for one in report.findings if one.check == "ledger"]
    locks[0].release()


def test_few_open_files(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home", max_files=256)
    daemon.start()
    try:
        assert "ulimit" in named(look(daemon), "RLIMIT_NOFILE", "256 open files allowed")
    finally:
        daemon.stop()


def test_a_large_debt_of_commands_to_replay(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    session = stubs.session()
    stubs.done(LaneClient(stubs, session).forward_backward())
    told = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    stubs.channel.close()
    (recovery,) = told.recoveries
    assert recovery.kept_bytes
    limit = f"[recovery]\nmax_spool_bytes = {int(recovery.kept_bytes * 1.1)}\n"
    # What the file or this shell says now is not what the daemon was started with.
    settings = daemon.home / "config.toml"
    settings.write_text(limit)
    assert not look(daemon).findings
    daemon.kill()
    daemon.start()
    settings.write_text("[recovery]\nmax_spool_bytes = 'many'\n")
    todo = named(look(daemon), session, "of recovery.max_spool_bytes")
    assert "save_state" in todo
    settings.unlink()
    daemon.kill()
    daemon.start({"FIRETITAN_RECOVERY_ENABLED": "0"})
    assert not [one for one in look(daemon).findings if one.check == "recovery"]


def test_gpus_that_torch_cannot_use(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firetitan_daemon.doctor.count_gpus", lambda: 2)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.11.0+cpu")
    assert "CUDA" in named(look(daemon), "torch", "2.11.0+cpu", "2 GPUs")
