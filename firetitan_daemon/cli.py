"""`firetitand`: serve, status, doctor, ls, rm, stop, drain, config, models.

Knows: the command line, exit codes, how a running daemon is found. Must not know: how it works.
Exit codes: 0 done, 1 failed, 2 wrong usage or setting, 3 another daemon owns the state, 4 no daemon
runs, 5 one runs and does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from firetitan_daemon.config import DaemonConfig, ServerConfig, home_folder, load_config
from firetitan_daemon.places import PlaceError, Places
from firetitan_daemon.processes import find_daemon, state_of
from firetitan_daemon.setting_values import ConfigError

EXIT_FAILED, EXIT_USAGE, EXIT_OWNED, EXIT_NOT_RUNNING, EXIT_SILENT = 1, 2, 3, 4, 5
_STOP_MARGIN_S = 15.0
_ANSWER_S = 5.0
_LINGER_S = 5.0
_DETAILS = "grpc-status-details-bin"
"""What only an answer of the daemon has."""
_T = TypeVar("_T")

_home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where all state lives; default $FIRETITAN_HOME, else ~/.firetitan.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="firetitan", prog_name="firetitand")
def main() -> None:
    """A local daemon that trains and samples language models."""


@main.command()
@_home_option
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--tcp", help="Serve at HOST:PORT too; see docs/operations.md.")
def serve(home: Path | None, log_level: str | None, tcp: str | None) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C; workers go on without it."""
    flags: dict[str, object] = {"log.level": log_level, "tcp.address": tcp}
    config = _config(home, {key: value for key, value in flags.items() if value is not None})
    logging.basicConfig(
        level=config.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    from firetitan_daemon.app import Daemon
    from firetitan_daemon.core.errors import FiretitanError
    from firetitan_daemon.host import raise_file_limit
    from firetitan_daemon.store.lock import StateOwned

    async def run() -> None:
        await Daemon(config).run()
        # A thread that waits for a file system for ever must not keep what has ended.
        ending = threading.Timer(_LINGER_S, os._exit, (0,))
        ending.daemon = True
        ending.start()

    raise_file_limit()
    try:
        asyncio.run(run())
    except StateOwned as error:
        _fail(str(error), EXIT_OWNED)
    except (FiretitanError, PlaceError, OSError) as error:
        _fail(str(error), EXIT_FAILED)


@main.command()
@_home_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(home: Path | None, as_json: bool) -> None:
    """Show the running daemon, its workers, and what is wrong with them."""
    places = _places(home)
    running = _running(places)
    from google.protobuf.json_format import MessageToDict

    from firetitan_daemon import health
    from firetitan_daemon.resources import Resources

    view = _asked(running["address"], lambda channel: Resources(channel).view())
    info, findings = view.info, health.findings(view)
    if as_json:
        fields = MessageToDict(info, preserving_proto_field_name=True)
        fields["findings"] = [dataclasses.asdict(one) for one in findings]
        click.echo(json.dumps({"address": running["address"], **fields}))
        return
    state = "draining" if info.draining else "running"
    addresses = " and ".join(filter(None, (running["address"], running.get("tcp_address"))))
    click.echo(f"firetitand {info.version} {state}, pid {info.pid}, {addresses}")
    click.echo(f"home {info.home}, since {info.start_time.ToJsonString()}")
    for worker in info.workers:
        click.echo(
            f"  {worker.kind:8} {worker.target:32} {worker.state:9} pid {worker.pid:<8} "
            f"{worker.memory_bytes / 2**20:8.0f} MiB"
        )
    for one in info.recoveries:
        state = f"recovering, {one.to_replay} to replay" if one.recovering else "kept"
        point = f"point at step {one.point_step}" if one.point_step else "no recovery point"
        click.echo(
            f"  session  {one.session:32} {state}; {point}, {one.kept_bytes / 2**20:.1f} MiB to "
            f"replay, cost {one.point_cost:.1%}; {one.recoveries} recoveries, "
            f"{one.replayed} replayed, the last in {one.recovery_s:.1f} s"
        )
    for finding in findings:
        click.echo(f"  ! {finding}")


@main.command()
@_home_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(home: Path | None, as_json: bool) -> None:
    """Say what is wrong with the home, its daemon and this machine, and what to do."""
    from firetitan_daemon.doctor import examine

    report = examine(_places(home))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        for name, fact in report.facts.items():
            click.echo(f"{name:13} {fact}")
        for finding in report.findings:
            click.echo(f"! {finding}")
        if not report.findings:
            click.echo("nothing is wrong")
    codes = {"none": EXIT_NOT_RUNNING, "silent": EXIT_SILENT}
    sys.exit(codes.get(report.state, EXIT_FAILED if report.findings else 0))


@main.command()
@_home_option
def stop(home: Path | None) -> None:
    """Stop the daemon: running commands end, the rest waits in the spool, workers go on."""
    places = _places(home)
    running = _running(places)
    drain_s = _drain_timeout_s(running["address"], home)
    places, pid = find_daemon(places)
    if pid is None or pid != running["pid"]:
        _fail(
            f"{places.announcement} names process {running['pid']}, but {pid} serves "
            f"{places.socket}; nothing was stopped",
            EXIT_FAILED,
        )
    os.kill(pid, signal.SIGTERM)
    _wait_gone(pid, drain_s)
    click.echo(f"stopped firetitand (pid {pid})")


@main.command()
@_home_option
def drain(home: Path | None) -> None:
    """As stop, asked for over the socket; says how many commands wait for the next start."""
    places = _places(home)
    running = _running(places)
    import grpc
    from firetitan.v1 import system_service_pb2, system_service_pb2_grpc

    drain_s = _drain_timeout_s(running["address"], home)
    with grpc.insecure_channel(running["address"]) as channel:
        stub = system_service_pb2_grpc.SystemServiceStub(channel)
        try:
            answer = stub.Drain(system_service_pb2.DrainRequest(), timeout=10)
        except grpc.RpcError as error:
            _refused(error)
    _wait_gone(running["pid"], drain_s)
    click.echo(f"drained firetitand (pid {running['pid']}), {answer.pending_operations} pending")


@main.command()
@_home_option
@click.option("--origin", is_flag=True, help="Also say where each value came from.")
def config(home: Path | None, origin: bool) -> None:
    """Show every setting."""
    try:
        _, settings = load_config(home=home)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    for setting in settings:
        value = str(setting.value) if isinstance(setting.value, Path) else setting.value
        line = f"{setting.key} = {json.dumps(value)}"
        click.echo(f"{line:56} # {setting.origin}" if origin else line)


@main.command()
@_home_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def models(home: Path | None, as_json: bool) -> None:
    """List promoted and configured models."""
    running = _running(_places(home))
    from google.protobuf.json_format import MessageToDict

    found = _models(running["address"])
    if as_json:
        fields = [MessageToDict(one, preserving_proto_field_name=True) for one in found]
        click.echo(json.dumps({"models": fields}))
        return
    for one in found:
        made = f"from {one.snapshot} on {one.base_model}" if one.snapshot else one.location
        click.echo(f"{one.name:48} {made}")


@main.command()
@_home_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ls(home: Path | None, as_json: bool) -> None:
    """List trainers, sessions and deployments: their state, how long unused, and by whom used."""
    running = _running(_places(home))
    from firetitan_daemon.resources import Resources

    rows = _asked(running["address"], lambda channel: Resources(channel).rows())
    if as_json:
        click.echo(json.dumps({"resources": [dataclasses.asdict(row) for row in rows]}))
        return
    for row in rows:
        idle = "" if row.idle_s is None else f"idle {row.idle_s:.0f} s"
        users = f"used by {', '.join(row.used_by)}" if row.used_by else ""
        waiting = f"{row.cleanup} when they have left" if row.cleanup else ""
        memory = f"{row.memory_bytes / 2**20:.0f} MiB" if row.memory_bytes else ""
        facts = "  ".join(filter(None, (row.what, memory, idle, users, waiting, row.error)))
        click.echo(f"{row.name:48} {row.state:10} {facts}")


@main.command()
@_home_option
@click.option("--force", is_flag=True, help="Also where clients use it.")
@click.argument("name", nargs=-1, required=True)
def rm(home: Path | None, force: bool, name: tuple[str, ...]) -> None:
    """Remove trainers, sessions and deployments by name; checkpoints and snapshots stay."""
    running = _running(_places(home))
    from firetitan_daemon.resources import Resources

    used = {
        row.name: row.used_by
        for row in _asked(running["address"], lambda channel: Resources(channel).rows())
    }
    for one in name:
        if used.get(one) and not force:
            _fail(f"{one} is used by {', '.join(used[one])}; --force removes it", EXIT_FAILED)
        if one not in used:
            _fail(f"{one} does not exist; `firetitand ls` lists what does", EXIT_FAILED)
    for one in name:
        _asked(running["address"], functools.partial(_remove, one))
        click.echo(f"removed {one}")


def _remove(name: str, channel: Any) -> None:
    from firetitan_daemon.resources import Resources

    Resources(channel).remove(name)


def _asked(address: str, ask: Callable[[Any], _T]) -> _T:
    """What a running daemon answers; ends the program where it does not."""
    import grpc

    try:
        with grpc.insecure_channel(address) as channel:
            return ask(channel)
    except grpc.RpcError as error:
        _refused(error)
    except ValueError as error:
        _fail(str(error), EXIT_USAGE)


def _refused(error: Any) -> NoReturn:
    """End the program after a call that failed."""
    answered = any(key == _DETAILS for key, _ in error.trailing_metadata() or ())
    if not answered and error.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE"):
        _fail(
            f"the daemon does not answer ({error.code().name}); why: firetitand doctor", EXIT_SILENT
        )
    _fail(f"the daemon refused: {error.details()}", EXIT_FAILED)


def _models(address: str) -> list[Any]:
    import grpc
    from firetitan.v1 import model_service_pb2, model_service_pb2_grpc

    found: list[Any] = []
    request = model_service_pb2.ListModelsRequest()
    with grpc.insecure_channel(address) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        try:
            while True:
                answer = stub.ListModels(request, timeout=10)
                found += answer.models
                request.page_token = answer.next_page_token
                if not request.page_token:
                    return found
        except grpc.RpcError as error:
            _refused(error)


def _config(home: Path | None, flags: dict[str, object]) -> DaemonConfig:
    try:
        return load_config(home=home, flags=flags)[0]
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)


def _places(home: Path | None) -> Places:
    try:
        return Places(home_folder(home))
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)


def _running(places: Places) -> dict[str, Any]:
    """What the running daemon announced; ends the program where none runs."""
    announced = places.announced()
    places, pid = find_daemon(places)
    if announced is None and pid is not None:  # it is about to end
        return {"address": f"unix:{places.socket}", "pid": pid}
    if announced is None or pid is None:
        was = f" (process {announced['pid']} is gone)" if announced is not None else ""
        _fail(
            f"no firetitand runs on {places.home}{was}; start it: firetitand serve",
            EXIT_NOT_RUNNING,
        )
    return {**announced, "address": f"unix:{places.socket}"}


def _drain_timeout_s(address: str, home: Path | None) -> float:
    """How long a daemon drains, by its own settings: those of this shell may be others.

    Asked before it is told to end. It is ended all the same where it does not say: it may hang, or
    be of a release that tells nothing of it.
    """
    import grpc
    from firetitan.v1 import system_service_pb2, system_service_pb2_grpc

    with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(address) as channel:
        stub = system_service_pb2_grpc.SystemServiceStub(channel)
        info = stub.GetSystemInfo(system_service_pb2.GetSystemInfoRequest(), timeout=_ANSWER_S)
        if info.HasField("drain_timeout"):
            return float(info.drain_timeout.ToNanoseconds() / 1e9)
    try:
        return load_config(home=home)[0].server.drain_timeout_s
    except ConfigError:
        return ServerConfig.drain_timeout_s


def _wait_gone(pid: int, drain_s: float) -> None:
    wait_s = drain_s + _STOP_MARGIN_S
    deadline = time.monotonic() + wait_s
    while state_of(pid) not in ("", "Z"):  # a zombie holds nothing any more
        if time.monotonic() > deadline:
            _fail(f"firetitand (pid {pid}) still runs after {wait_s:g} s; see its log", EXIT_FAILED)
        time.sleep(0.02)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"firetitand: {message}", err=True)
    sys.exit(code)
