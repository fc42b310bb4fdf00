"""What a setting may be: nothing is accepted that stops the daemon or every client."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from firetitan.v1 import system_service_pb2
from grpc import aio

from firetitan_daemon import config
from firetitan_daemon.config import DaemonConfig, load_config
from firetitan_daemon.control import leases
from firetitan_daemon.rpc import convert
from firetitan_daemon.setting_values import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def load(tmp_path: Path, variables: dict[str, str] | None = None, toml: str = "") -> DaemonConfig:
    (tmp_path / "config.toml").write_text(toml)
    return load_config(home=tmp_path, environment=variables or {})[0]


def refused(tmp_path: Path, variables: dict[str, str] | None = None, toml: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, variables, toml)
    return str(caught.value)


def numbers(kind: type) -> list[str]:
    """Every setting of a kind, `section.name`."""
    sections = typing.get_type_hints(DaemonConfig)
    return [
        f"{section}.{entry.name}"
        for section in config._SECTIONS
        for entry in dataclasses.fields(sections[section])
        if typing.get_type_hints(sections[section])[entry.name] is kind
    ]


def variable(key: str) -> str:
    return f"FIRETITAN_{key.replace('.', '_').upper()}"


@pytest.mark.parametrize("key", numbers(float))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400"])
def test_no_float_is_less_than_nothing_or_endless(tmp_path: Path, key: str, value: str) -> None:
    told = refused(tmp_path, {variable(key): value})
    assert key in told and repr(value) in told and variable(key) in told and ": must " in told
    section, _, name = key.partition(".")
    if value in ("nan", "inf", "-inf"):
        told = refused(tmp_path, toml=f"[{section}]\n{name} = {value}\n")
        assert f"{key} = {value}" in told and "config.toml" in told


@pytest.mark.parametrize("key", numbers(int))
def test_no_int_is_larger_than_what_carries_it(tmp_path: Path, key: str) -> None:
    for value in (2**63, -1, 10**400):
        assert f"{key} = '{value}'" in refused(tmp_path, {variable(key): str(value)})
    (name,) = key.split(".")[1:]
    field = system_service_pb2.Limits.DESCRIPTOR.fields_by_name.get(name)
    if field is not None and field.type == field.TYPE_INT32:
        assert "2147483647" in refused(tmp_path, {variable(key): str(2**31)})


def test_an_int_too_long_for_a_float(tmp_path: Path) -> None:
    told = refused(tmp_path, toml=f"[leases]\nttl_s = {10**400}\n")
    assert told.startswith("leases.ttl_s = 1000")


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("leases.ttl_s", "0.5", "86400"),
        ("limits.max_message_bytes", "4096", "1073741823"),
        ("limits.max_operations", "1", "2147483647"),
        ("limits.max_session_operations", "1", "2147483647"),
        ("limits.max_streams", "1", "2147483647"),
        ("limits.max_replicas", "1", "2147483647"),
        ("limits.max_queued_bytes", "1", str(2**63 - 1)),
        ("workers.adopt_timeout_s", "0.1", None),
        ("workers.num_threads", "0", "4096"),
        ("recovery.cost_share", "0", None),
        ("server.drain_timeout_s", "0", "3153600000"),
    ],
)
def test_ends_are_in_and_what_is_beyond_is_named(
    tmp_path: Path, key: str, low: str, high: str | None
) -> None:
    for value in filter(None, (low, high)):
        load(tmp_path, {variable(key): value})
    if float(low):
        told = refused(tmp_path, {variable(key): "0"})
        assert f"{key} = '0' (from {variable(key)})" in told and f"at least {low}" in told
    if high is not None:
        above = str(int(high) + 1)
        told = refused(tmp_path, {variable(key): above})
        assert f"at most {high}" in told and repr(above) in told


def test_a_lease_may_last_as_long_as_clients_may_ask(tmp_path: Path) -> None:
    low, high = leases._TTL_S
    for value in (low, high):
        assert load(tmp_path, {"FIRETITAN_LEASES_TTL_S": str(value)}).leases.ttl_s == value
    refused(tmp_path, {"FIRETITAN_LEASES_TTL_S": str(low - 0.01)})
    refused(tmp_path, {"FIRETITAN_LEASES_TTL_S": str(high + 1)})


async def test_the_largest_message_can_be_told_to_grpc(tmp_path: Path) -> None:
    given = {"FIRETITAN_LIMITS_MAX_MESSAGE_BYTES": str(2**30 - 1)}
    largest = load(tmp_path, given).limits.max_message_bytes
    aio.server(options=(("grpc.max_receive_message_length", 2 * largest),))


async def test_a_message_one_byte_larger_cannot(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        aio.server(options=(("grpc.max_receive_message_length", 2 * 2**30),))
    assert "1073741823" in refused(tmp_path, {"FIRETITAN_LIMITS_MAX_MESSAGE_BYTES": str(2**30)})


def test_the_longest_drain_can_be_told(tmp_path: Path) -> None:
    given = {"FIRETITAN_SERVER_DRAIN_TIMEOUT_S": "3153600000"}
    longest = load(tmp_path, given).server.drain_timeout_s
    assert convert.seconds(convert.duration(longest)) == longest


@pytest.mark.parametrize(
    "names",
    ["gpubox", "gpubox.example., 10.1.2.3", "*.lab.example", "::1,fe80::1", "a_b-c.example", ""],
)
def test_names_that_a_certificate_can_hold(tmp_path: Path, names: str) -> None:
    from firetitan_daemon import certificates

    found = load(tmp_path, {"FIRETITAN_TCP_NAMES": names}).tcp.host_names
    assert len(found) == len([one for one in names.split(",") if one.strip()])
    certificates.for_server(certificates.new_authority("test"), {*found, "localhost"})


@pytest.mark.parametrize(
    ("names", "way_out"),
    [
        ("gpubox,müller", "xn--mller-kva"),
        ("https://gpubox", "without scheme and port"),
        ("gpubox:7465", "without scheme and port"),
        ("a b", "'a b'"),
        ("x" * 254, "without scheme and port"),
        ("-x", "'-x'"),
        ("gpu..box", "'gpu..box'"),
        ("gpu\n", None),
    ],
)
def test_other_names_are_named(tmp_path: Path, names: str, way_out: str | None) -> None:
    if way_out is None:  # blanks around a name are none of it
        assert load(tmp_path, {"FIRETITAN_TCP_NAMES": names}).tcp.host_names == (names.strip(),)
        return
    told = refused(tmp_path, {"FIRETITAN_TCP_NAMES": names})
    assert told.startswith(f"tcp.names = {names!r} (from FIRETITAN_TCP_NAMES): ")
    assert way_out in told


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("FIRETITAN_LIMIT_MAX_STREAMS", "FIRETITAN_LIMITS_MAX_STREAMS"),
        ("FIRETITAN_WORKER_NUM_THREADS", "FIRETITAN_WORKERS_NUM_THREADS"),
        ("FIRETITAN_LEASE_TTL_S", "FIRETITAN_LEASES_TTL_S"),
        ("FIRETITAN_LOGLEVEL", "FIRETITAN_LOG_LEVEL"),
        ("FIRETITAN_SERVERS_DRAIN_TIMEOUT", "FIRETITAN_SERVER_DRAIN_TIMEOUT_S"),
        ("firetitan_limits_max_streams", "FIRETITAN_LIMITS_MAX_STREAMS"),
        ("FIRETITAN_LIMITS_MAX_STREAM", "limits.max_streams"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_an_error(
    tmp_path: Path, name: str, meant: str
) -> None:
    told = refused(tmp_path, {name: "3"})
    assert name in told and "no such setting" in told and f"did you mean {meant}?" in told


def test_a_key_of_the_file_that_is_nearly_a_setting(tmp_path: Path) -> None:
    told = refused(tmp_path, toml="[limit]\nmax_streams = 3\n")
    assert "limit.max_streams" in told and "did you mean limits.max_streams?" in told


def test_variables_of_others_are_left_alone(tmp_path: Path) -> None:
    """Every one that a page or a program of this project names, and those of strangers."""
    page = (ROOT / "docs" / "operations.md").read_text().partition("Other variables:")[2]
    documented = re.findall(r"^\| `(FIRETITAN_\w+)` \|", page, re.MULTILINE)
    assert {"FIRETITAN_HOME", "FIRETITAN_ADDRESS", "FIRETITAN_CACHE"} <= set(documented)
    files = [ROOT / "Makefile"]
    for folder in ("firetitan_client", "firetitan_daemon", "tests/support", "tests/chaos",
                   "tests/faults", "examples", "bench"):  # fmt: skip
        files += [one for one in (ROOT / folder).rglob("*.py") if "node_modules" not in one.parts]
    named = {
        name
        for one in files
        for name in re.findall(r"\bFIRETITAN_[A-Z_]*[A-Z]\b", one.read_text())
        if name != "FIRETITAN_SECTION_NAME"
    }
    assert len(named) > 20
    settings = {variable(key) for kind in (float, int, bool, str) for key in numbers(kind)}
    for name in sorted((named | set(documented)) - settings):
        load(tmp_path, {name: "1"})
    for name in ("FIRETITAN_TOKEN", "FIRETITAN_MY_JOB", "FIRETITAN_SERVE_ARGS", "FIRETITAN_"):
        load(tmp_path, {name: "1"})
