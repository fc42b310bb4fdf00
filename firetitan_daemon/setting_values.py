"""What a setting may be: its type, its range, and what was meant where there is no such setting.

Knows: the text of the errors, what gRPC, protobuf and certificates can carry. Must not know: where
settings come from, what uses them.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Iterable

from firetitan_daemon.core.expiry import MAX_TTL_S

LEVELS = ("debug", "info", "warning", "error")
HOST_PORT = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*\.?")
_LONGEST_HOST_NAME = 253
_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_SECONDS = (0.0, MAX_TTL_S)
_RANGES: dict[str, tuple[float, float]] = {
    # gRPC is told twice as much, in a C int; below the low end no client could say anything.
    "limits.max_message_bytes": (4096, 2**30 - 1),
    # Nothing would be accepted with 0; GetSystemInfo tells them as int32 and int64.
    "limits.max_session_operations": (1, _INT32),
    "limits.max_operations": (1, _INT32),
    "limits.max_streams": (1, _INT32),
    "limits.max_replicas": (1, _INT32),
    "limits.max_queued_bytes": (1, _INT64),
    "recovery.spool_bytes": (0, _INT64),
    "recovery.max_spool_bytes": (0, _INT64),
    # A worker that can only be late would stay out of reach.
    "workers.adopt_timeout_s": (0.1, MAX_TTL_S),
    "workers.num_threads": (0, 4096),
    # What control.leases takes from clients, too.
    "leases.ttl_s": (0.5, 86400.0),
}
"""Inclusive, of what is not `_SECONDS` or any number that is not negative."""
_CLOSE = 0.8
"""How alike two names are where one was meant for the other, as difflib counts."""


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the key, the value and where it came from."""


def convert(key: str, value: object, origin: str, kind: type) -> object:
    """A value as its setting has it.

    Args:
        key: Of the setting.
        value: From a file, a variable (then it is text) or the command line.
        origin: For the error.
        kind: bool, int, float or str.

    Raises:
        ConfigError: Of another type, or out of range.
    """
    where = f"{key} = {value!r} (from {origin})"
    if kind is bool and isinstance(value, str) and value.lower() in ("0", "1", "false", "true"):
        return value.lower() in ("1", "true")
    if kind in (int, float) and isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            raise ConfigError(f"{where}: must be a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: must be of type {kind.__name__}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(key, value, where)
    if key == "log.level" and value not in LEVELS:
        raise ConfigError(f"{where}: must be one of {', '.join(LEVELS)}")
    if key == "tcp.address" and value:
        match = HOST_PORT.fullmatch(str(value))
        if match is None or int(match["port"]) > 65535:
            raise ConfigError(f"{where}: must be host:port, such as 127.0.0.1:7465")
    if key == "tcp.names":
        for name in separated(str(value)):
            _check_host_name(name, where)
    return value


def _check_range(key: str, value: float, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: must be a finite number")
    default = _SECONDS if key.endswith("_s") else (0, _INT32 if isinstance(value, int) else None)
    low, high = _RANGES.get(key, default)
    if value < low:
        told = "not be negative" if not low else f"be at least {_number(low)}"
        raise ConfigError(f"{where}: must {told}")
    if high is not None and value > high:
        raise ConfigError(f"{where}: must be at most {_number(high)}")


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def separated(text: str) -> tuple[str, ...]:
    """What stands between commas, one by one."""
    return tuple(one.strip() for one in text.split(",") if one.strip())


def _check_host_name(name: str, where: str) -> None:
    try:
        ipaddress.ip_address(name)
        return
    except ValueError:
        if len(name) <= _LONGEST_HOST_NAME and _HOST_NAME.fullmatch(name):
            return
    todo = "give host names or addresses, without scheme and port"
    if not name.isascii():
        try:
            todo = f"write it as certificates have it: {name.encode('idna').decode()}"
        except UnicodeError:
            todo = "write it in ASCII, as certificates have it"
    raise ConfigError(f"{where}: {name!r} is no host name; {todo}")


def unknown(key: str, origin: str, settings: Iterable[str]) -> ConfigError:
    """The error for a key that is none, with the setting that was meant where there is one.

    Args:
        key: As it was written.
        origin: Where.
        settings: Every key there is.
    """
    meant = difflib.get_close_matches(key, list(settings), 1, _CLOSE)
    way_out = f"did you mean {meant[0]}?" if meant else "docs/operations.md lists all of them"
    return ConfigError(f"{key}: no such setting (from {origin}); {way_out}")


_OTHERS = frozenset(
    {
        "FIRETITAN_HOME", "FIRETITAN_ADDRESS", "FIRETITAN_API_KEY", "FIRETITAN_CREDENTIALS",
        "FIRETITAN_AUTOSTART", "FIRETITAN_PATIENCE_S", "FIRETITAN_CACHE", "FIRETITAN_FAILPOINTS",
    }
)  # fmt: skip
"""Variables of ours that are no settings of the daemon."""


def check_variable(variable: str, settings: Iterable[str]) -> None:
    """See that a variable of the environment is not a setting that was nearly written.

    Whatever is less like one than that is left alone: it may be another program's.

    Args:
        variable: Its name; not a setting's.
        settings: Every key there is.

    Raises:
        ConfigError: It is.
    """
    prefix = "FIRETITAN_"
    name = variable.upper()
    if not name.startswith(prefix) or name in _OTHERS or name.startswith("FIRETITAN_TEST_"):
        return
    keys = [key.replace(".", "_").upper() for key in settings]
    meant = difflib.get_close_matches(name.removeprefix(prefix), keys, 1, _CLOSE)
    if meant:
        raise ConfigError(
            f"{variable}: no such setting; did you mean {prefix}{meant[0]}? (A variable of another "
            f"program is called otherwise: {prefix}... are this one's)"
        )
