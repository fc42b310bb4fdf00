"""`firetitand doctor`: what is wrong with a home, its daemon and this machine, and what to do.

Knows: files of a home, processes, sockets, versions. Must not know: the command line, what a
running daemon tells of itself (`health`). Changes nothing, and never opens the ledger of a running
daemon with SQLite: it looks that over itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firetitan_daemon import health
from firetitan_daemon.answers import ask
from firetitan_daemon.client_addresses import check_address
from firetitan_daemon.config import load_config
from firetitan_daemon.handshake import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION
from firetitan_daemon.health import Finding
from firetitan_daemon.host import count_gpus, look_at
from firetitan_daemon.launch.bundle import Bundle, BundleError
from firetitan_daemon.places import Places
from firetitan_daemon.processes import (
    daemons,
    file_limit,
    find_daemon,
    is_locked,
    open_files,
)
from firetitan_daemon.resources import View
from firetitan_daemon.setting_values import ConfigError
from firetitan_daemon.store import schema

FEW_FILES = 1024
_WAL_FIX = (3, 51, 3)
_LARGE_DEBT = 0.8


@dataclass(frozen=True)
class Report:
    """What was found."""

    state: str
    """`running`, `silent` (it runs and does not answer) or `none`: none serves, though one may be
    about to, or about to end."""
    facts: dict[str, str]
    """Versions and the like, to be passed on with a question."""
    findings: Sequence[Finding]


def examine(places: Places, environment: dict[str, str] | None = None) -> Report:
    """Look everything over.

    Args:
        places: Of the home.
        environment: Stands in for `os.environ`.
    """
    variables = dict(os.environ) if environment is None else environment
    places, pid = find_daemon(places)
    state, view, trouble = ask(places, pid)
    found = [
        *check_announcement(places, pid, view),
        *trouble,
        *check_address(places, pid, variables),
        *check_home(places),
        *check_settings(places, variables),
        *check_worker_folders(places, state, view),
        *check_machine(pid),
    ]
    if view is not None:
        found += [*health.findings(view), *check_debt(places, variables, view)]
        found += check_version(view)
    elif state == "none":
        found += [*check_none_runs(places), *check_closed_ledger(places)]
    told = facts(places, view)
    if variables.get("FIRETITAN_ADDRESS"):
        told["clients go to"] = variables["FIRETITAN_ADDRESS"]
    return Report(state, told, found)


def check_announcement(places: Places, pid: int | None, view: View | None) -> Iterator[Finding]:
    """`daemon.json` names the daemon that serves, and it serves this home."""
    announced = places.announced()
    if pid is not None and announced is not None and announced.get("pid") != pid:
        yield Finding(
            "daemon",
            str(places.announcement),
            f"names process {announced.get('pid')}, but {pid} serves {places.socket}",
            f"stop both (kill {pid}), then: firetitand serve",
        )
    if view is not None and Path(view.info.home).resolve() != places.home.resolve():
        yield Finding(
            "daemon",
            str(places.socket),
            f"the daemon behind it (pid {view.info.pid}) has the home {view.info.home}",
            f"use that one (FIRETITAN_HOME={view.info.home}), or stop it",
        )


def check_none_runs(places: Places) -> Iterator[Finding]:
    """Why no daemon serves, and what a former one left."""
    if is_locked(places.lock):
        yield Finding(
            "daemon",
            str(places.lock),
            f"held by process {_word(places.lock)}, which does not serve: it starts or ends",
            "wait; if it lasts, see its log and end that process",
        )
        return
    yield Finding("daemon", str(places.home), "no daemon runs on it", "firetitand serve")
    announced = places.announced()
    for path in (places.announcement, places.socket):
        if path.exists():
            was = f" of process {announced.get('pid')}, which is gone" if announced else ""
            yield Finding(
                "daemon", str(path), f"left over{was}", "nothing: the next start replaces it"
            )
    for pid, home in daemons():
        if home != str(places.home):
            yield Finding(
                "daemon",
                home,
                f"firetitand (pid {pid}) runs on this other home",
                f"if it is the one you mean: FIRETITAN_HOME={home}",
            )


def check_home(places: Places) -> Iterator[Finding]:
    """Home and what is in it are there, this user's alone, and can be written to."""
    home = look_at(places.home)
    if not home.exists:
        yield Finding(
            "home",
            str(places.home),
            "does not exist",
            "pass --home if it is elsewhere; firetitand serve makes a new one",
        )
        return
    for path in (places.home, places.spool, places.store, places.workers, places.run):
        if not path.exists():
            continue
        found = path.stat()
        if found.st_uid != os.geteuid():
            yield Finding(
                "home",
                str(path),
                f"belongs to user {found.st_uid}, not to you ({os.geteuid()})",
                f"chown -R {os.geteuid()} {path}, or use another home",
            )
        elif stat.S_IMODE(found.st_mode) & 0o077:
            yield Finding(
                "home",
                str(path),
                f"open to other users (mode {stat.S_IMODE(found.st_mode):o})",
                f"chmod 700 {path}",
            )
    if not home.writable:
        yield Finding(
            "home",
            str(places.home),
            "cannot be written to",
            "make its file system writable again, or give its owner the right to write",
        )
    elif home.free_bytes < health.FULL_BYTES:
        yield Finding(
            "home",
            str(places.home),
            f"disk full: {home.free_bytes / 2**20:.1f} MiB free",
            "free space there, e.g. by deleting checkpoints and snapshots",
        )


def check_settings(places: Places, environment: dict[str, str]) -> Iterator[Finding]:
    """The settings can be read."""
    try:
        load_config(home=places.home, environment=environment)
    except ConfigError as error:
        yield Finding("settings", "config.toml and environment", str(error), "correct it")


def check_closed_ledger(places: Places) -> Iterator[Finding]:
    """The ledger of a home without a daemon: a copy of it is whole, and of a known schema.

    One that starts or ends writes in it, and a copy made meanwhile is of two moments.
    """
    if not places.database.exists() or is_locked(places.lock):
        return
    with tempfile.TemporaryDirectory(prefix="firetitan-doctor-") as folder:
        copy = Path(folder) / places.database.name
        try:
            for end in ("", "-wal"):
                part = places.database.with_name(places.database.name + end)
                if part.exists():
                    shutil.copyfile(part, copy.with_name(part.name))
        except OSError as error:
            yield Finding(
                "ledger", str(places.database), f"cannot be copied: {error}", "see its disk"
            )
            return
        if is_locked(places.lock):
            return
        problems, version = schema.examine(copy)
    for problem in problems:
        yield health.broken_ledger(str(places.database), problem)
    if version > len(schema.MIGRATIONS):
        yield Finding(
            "ledger",
            str(places.database),
            f"has schema {version}, this firetitand knows up to {len(schema.MIGRATIONS)}",
            "run the newer firetitan that wrote it, or use another home",
        )


def check_worker_folders(places: Places, state: str, view: View | None) -> Iterator[Finding]:
    """Every live worker process belongs to a record, and speaks a protocol that is spoken here."""
    if not places.workers.is_dir():
        return
    known = {one.id for one in view.info.workers} if view is not None else None
    for folder in sorted(places.workers.iterdir()):
        bundle = Bundle(places.workers, folder.name)
        if not is_locked(bundle.lock_path):
            continue
        try:
            spec, pid = bundle.read_spec(), bundle.read_bootstrap().pid
        except BundleError:
            continue  # it starts
        where = f"workers/{folder.name}"
        if not OLDEST_PROTOCOL_VERSION <= spec.protocol_version <= PROTOCOL_VERSION:
            yield Finding(
                "workers",
                where,
                f"process {pid} speaks protocol {spec.protocol_version}, this firetitand "
                f"{OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}",
                "run the firetitan it was started by, save, and create it anew with this one",
            )
        elif state == "none":
            yield Finding(
                "workers",
                where,
                f"process {pid} goes on without a daemon, for {spec.target}",
                "nothing: the next start finds it again",
            )
        elif known is not None and folder.name not in known:
            yield Finding(
                "workers",
                where,
                f"process {pid} belongs to no record of the daemon (it was for {spec.target})",
                f"kill {pid}",
            )


def check_debt(places: Places, environment: dict[str, str], view: View) -> Iterator[Finding]:
    """A replay after a worker's death stays possible, by the settings that the daemon has."""
    limits: Any = view.info.recovery_limits
    if not view.info.HasField("recovery_limits"):  # of a release that does not tell
        try:
            limits = load_config(home=places.home, environment=environment)[0].recovery
        except ConfigError:
            return
    for one in view.info.recoveries:
        share = one.kept_bytes / max(1, limits.max_spool_bytes)
        if limits.enabled and share > _LARGE_DEBT:
            yield Finding(
                "recovery",
                one.session,
                f"{one.kept_bytes / 2**20:.0f} MiB of commands since the last recovery point "
                f"(step {one.point_step}), {share:.0%} of recovery.max_spool_bytes; beyond that a "
                "death of its worker is a loss",
                "save_state now and then, or raise recovery.max_spool_bytes or max_cost_share",
            )


def check_version(view: View) -> Iterator[Finding]:
    """The daemon is of the release that is installed."""
    installed = _version("firetitan")
    if view.info.version != installed:
        yield Finding(
            "daemon",
            "firetitand",
            f"runs {view.info.version}, {installed} is installed",
            "firetitand stop, then firetitand serve; workers go on",
        )


def check_machine(pid: int | None) -> Iterator[Finding]:
    """Open files and GPUs."""
    allowed = file_limit(pid or os.getpid(), hard=pid is None)
    used = open_files(pid) if pid is not None else 0
    if allowed is not None and (allowed < FEW_FILES or used > 0.8 * allowed):
        yield Finding(
            "machine",
            "RLIMIT_NOFILE",
            f"{allowed} open files allowed, {used} used",
            "raise it (ulimit -Hn, LimitNOFILE= of the service) and start the daemon again",
        )
    torch = _version("torch")
    if count_gpus() and torch.endswith("+cpu"):
        yield Finding(
            "machine",
            "torch",
            f"{torch} cannot use the {count_gpus()} GPUs of this machine",
            "install a build of torch with CUDA, and create trainers and deployments anew",
        )


def facts(places: Places, view: View | None) -> dict[str, str]:
    """What to pass on with a question."""
    names = ("firetitan", "grpcio", "torch", "transformers")
    sqlite = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < _WAL_FIX:
        sqlite += " (with the WAL-reset bug, which needs two connections; a ledger has one)"
    found = {
        "home": str(places.home),
        "python": platform.python_version(),
        "sqlite": sqlite,
        "gpus": str(count_gpus()),
        **{name: _version(name) for name in names},
    }
    if view is not None:
        found["daemon"] = f"{view.info.version}, pid {view.info.pid}"
        found["workers"] = str(len(view.info.workers))
        found["clients"] = ", ".join(lease.label for lease in view.leases) or "none"
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"
