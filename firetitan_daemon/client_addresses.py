"""Whether FIRETITAN_ADDRESS leads to the daemon of a home, as `firetitand doctor` tells it.

Knows: the forms of an address that clients take, where the daemon announced that it listens. Must
not know: how it is called. Of another machine nothing can be known here, so nothing is said: its
name may be this one's on a router, or the end of a tunnel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from firetitan_daemon.config import TcpConfig, load_config
from firetitan_daemon.credentials import is_loopback, own_names
from firetitan_daemon.health import Finding
from firetitan_daemon.places import Places
from firetitan_daemon.setting_values import HOST_PORT, ConfigError

_ENDPOINT, _TCP = "firetitan+", "tcp:"


def check_address(
    places: Places, pid: int | None, environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Clients of this environment come to this home's daemon, so far as can be known here."""
    address = environment.get("FIRETITAN_ADDRESS")
    if not address:
        return
    try:
        tcp = load_config(home=places.home, environment=environment)[0].tcp
    except ConfigError:
        tcp = TcpConfig()
    announced = places.announced() if pid is not None else None
    listens = tcp.address if announced is None else str(announced.get("tcp_address") or "")
    wrong = _wrong(address, places, listens, tcp.host_names)
    if wrong:
        at = " and ".join(filter(None, (f"unix:{places.socket}", listens)))
        yield Finding(
            "daemon",
            "FIRETITAN_ADDRESS",
            f"{wrong}: this home's daemon is at {at}",
            "unset it, unless another daemon is meant: then look at the home of that one, "
            "firetitand doctor --home ...",
        )


def _wrong(address: str, places: Places, listens: str, names: Iterable[str]) -> str:
    bare = address
    if bare.startswith(_ENDPOINT):
        bare = bare.removeprefix(_ENDPOINT).partition("#")[0]
    path = bare.removeprefix("unix://" if bare.startswith("unix:///") else "unix:")
    if path.startswith(("/", "~", "./")):
        # os.path: pathlib raises for a home of nobody.
        meant = os.path.realpath(os.path.expanduser(path))  # noqa: PTH111
        return "" if meant == os.path.realpath(places.socket) else f"sends clients to {address}"
    target = HOST_PORT.fullmatch(bare.removeprefix(_TCP))
    if target is None:
        return f"is {address!r}, no path of a socket and no host:port; clients refuse it"
    if not _is_here(target["host"], names):
        return ""
    own = HOST_PORT.fullmatch(listens)
    if own is not None and int(own["port"]) == int(target["port"]):
        return ""
    return f"sends clients to {address}, where it does not listen"


def _is_here(host: str, names: Iterable[str]) -> bool:
    """Whether a host is this machine, so far as it knows."""
    host = host.strip("[]").casefold()
    return is_loopback(host) or host in {one.casefold() for one in (*own_names(), *names)}
