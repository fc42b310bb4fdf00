"""Where the daemon is, and starting one.

Knows: FIRETITAN_HOME, `daemon.json`, the forms an address can take, the command that starts a
daemon. Must not know: gRPC, what is asked of the daemon.

Nothing here or elsewhere in the client ever dials out by itself: a cloud URL means the local
daemon; another machine is called where its `host:port` was given.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from firetitan_client.errors import DaemonNotRunning

logger = logging.getLogger("firetitan")

START_COMMAND = "firetitand serve"
_ENDPOINT = "firetitan+"
_TCP = "tcp:"
_HOST_PORT = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
_SCHEMES = ("dns", "ipv4", "ipv6", "unix-abstract", "vsock")
"""What gRPC takes for the beginning of another kind of address."""
_LONGEST_RUN_FOLDER = 66
"""Bytes; behind it a slash and the longest name of a socket have to fit into its address."""
_NOT_PASSED = ("FIRETITAN_ADDRESS", "FIRETITAN_API_KEY")
"""The client's own: no daemon is given them."""


@dataclass(frozen=True)
class Endpoint:
    """An address and, where it names one, a trainer on it."""

    address: str
    """`unix:/home/me/.firetitan/run/firetitan.sock`, or `tcp:host:port`."""
    trainer_id: str | None = None

    @property
    def base_url(self) -> str:
        """As text that any process can pass as `base_url`."""
        return f"{_ENDPOINT}{self.address}" + (f"#{self.trainer_id}" if self.trainer_id else "")


def home() -> Path:
    """`$FIRETITAN_HOME`, else `~/.firetitan`, behind any links: as the daemon names it.

    Raises:
        ValueError: It lies in the home of a user whom there is not.
    """
    text = os.environ.get("FIRETITAN_HOME") or "~/.firetitan"
    try:
        return Path(os.path.realpath(Path(text).expanduser()))
    except RuntimeError as error:
        raise ValueError(
            f"FIRETITAN_HOME: {text!r} lies in the home of no user; give a folder"
        ) from error


def resolve(base_url: str | None = None, address: str | None = None) -> Endpoint:
    """Find the daemon: `address`, an address in `base_url`, FIRETITAN_ADDRESS, FIRETITAN_HOME.

    Args:
        base_url: None or a cloud URL (both mean the local daemon), or an address, or an endpoint
            `firetitan+unix:/path#trainer`.
        address: `unix:/path`, `/path`, `host:port` or `tcp:host:port`; wins.

    Raises:
        ValueError: Not an address.
    """
    trainer_id = None
    for name, value in (("base_url", base_url), ("address", address)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}: is {value!r}; give a text, e.g. unix:/path")
    if base_url and base_url.startswith(_ENDPOINT):
        base_url, _, fragment = base_url.removeprefix(_ENDPOINT).partition("#")
        trainer_id = fragment or None
    elif base_url and base_url.startswith(("http://", "https://")):
        # Without what may be before the host: a password.
        logger.info("base_url: %s is not dialled, the daemon serves", base_url.rpartition("@")[2])
        base_url = None
    given = address or base_url or os.environ.get("FIRETITAN_ADDRESS")
    return Endpoint(_normalise(given) if given else local_address(), trainer_id)


def _normalise(address: str) -> str:
    if address.startswith(_ENDPOINT):
        address = address.removeprefix(_ENDPOINT).partition("#")[0]
    path = (
        address.removeprefix("unix://")
        if address.startswith("unix:///")
        else (address.removeprefix("unix:"))
    )
    if path.startswith(("/", "~", "./")):
        # os.path: pathlib raises for a home of nobody.
        return f"unix:{Path(os.path.expanduser(path)).absolute()}"  # noqa: PTH111
    target = address.removeprefix(_TCP)
    if _HOST_PORT.fullmatch(target) and target.partition(":")[0] not in _SCHEMES:
        return f"{_TCP}{target}"
    raise ValueError(
        f"address: {address!r} is neither a Unix socket nor host:port; give "
        f"unix:/path/to/firetitan.sock (the daemon writes its own to {home() / 'daemon.json'}), or "
        "host:port of a daemon that serves over TCP"
    )


def tcp_target(address: str) -> str | None:
    """`host:port` of an address over TCP; None for a Unix socket."""
    return address.removeprefix(_TCP) if address.startswith(_TCP) else None


def local_address() -> str:
    """Where this home's daemon serves, or will once it is started."""
    try:
        return str(json.loads((home() / "daemon.json").read_text())["address"])
    except (OSError, ValueError, KeyError):
        return f"unix:{_socket_to_be()}"


def _socket_to_be() -> Path:
    """Where a daemon that is started on this home will serve: `firetitan_daemon.places` says so.

    Its folder is in the temporary directory where the home's path is too long for a socket's.
    """
    run = home() / "run"
    if len(os.fsencode(run)) > _LONGEST_RUN_FOLDER:
        digest = hashlib.blake2b(os.fsencode(home()), digest_size=8).hexdigest()
        run = Path(tempfile.gettempdir()) / f"firetitan-{os.getuid()}-{digest}"
    return run / "firetitan.sock"


def not_running(address: str, cause: str = "") -> DaemonNotRunning:
    """The error for an address where nobody listens.

    Args:
        address: Of the daemon.
        cause: In gRPC's words; over TCP there are many.
    """
    target = tcp_target(address)
    if target is None:
        return DaemonNotRunning(f"no daemon at {address}; start one with: {START_COMMAND}")
    return DaemonNotRunning(
        f"no daemon answers at {target}: {cause or 'it went away'}. Start one there with: "
        f"{START_COMMAND} --tcp {target} (`Socket closed`: it wants client.crt and client.key "
        "beside the token, or is something else)"
    )


def autostart_wanted(autostart: bool | None) -> bool:
    """Whether to start a daemon: the argument, else FIRETITAN_AUTOSTART."""
    if autostart is not None:
        return autostart
    return os.environ.get("FIRETITAN_AUTOSTART", "").lower() in ("1", "true", "yes")


def start_daemon(timeout_s: float = 30.0) -> str:
    """Start a detached daemon on this home and wait until it serves; returns its address.

    Raises:
        DaemonNotRunning: It ended or did not serve in time; the text ends with its log.
    """
    command = _command()
    log_path = home() / "log" / "firetitand.log"
    home().mkdir(mode=0o700, parents=True, exist_ok=True)
    log_path.parent.mkdir(mode=0o700, exist_ok=True)
    record = home() / "daemon.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in _NOT_PASSED},
        )
    logger.warning("no daemon was running: started `%s`, pid %d", " ".join(command), process.pid)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if record.exists() and record.stat().st_mtime_ns != before:
            process.returncode = 0  # it outlives this process: nobody is to wait for it
            return local_address()
        code = process.poll()
        if code == 3:  # another process was faster: its daemon owns the state
            return local_address()
        if code is not None:
            break
        time.sleep(0.02)
    tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-10:])
    raise DaemonNotRunning(f"`{' '.join(command)}` does not serve; the end of {log_path}:\n{tail}")


def _command() -> list[str]:
    beside = Path(sys.executable).parent / "firetitand"
    found = str(beside) if beside.exists() else shutil.which("firetitand")
    return [found, "serve"] if found else [sys.executable, "-P", "-m", "firetitan_daemon", "serve"]
