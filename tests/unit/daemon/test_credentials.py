"""Token and certificates: made once, refused where they are not their owner's alone."""

from __future__ import annotations

import ipaddress
import shutil
import sys
from pathlib import Path

import pytest
from cryptography import x509

from firetitan_daemon.credentials import ServerCredentials, is_loopback, server_credentials
from firetitan_daemon.places import PlaceError, Places


@pytest.fixture
def places(tmp_path: Path) -> Places:
    places = Places(tmp_path / "home")
    places.make()
    return places


def test_made_once(places: Places) -> None:
    first, again = server_credentials(places), server_credentials(places)
    assert (first.token, first.ca) == (again.token, again.ca)
    assert first.certificate != again.certificate
    for secret in (first.token, first.key.decode()):
        assert secret not in repr(first)


def test_the_certificate_has_the_names_clients_use(places: Places) -> None:
    shown = server_credentials(places, ("gpubox.example", "10.1.2.3"))
    names = (
        x509.load_pem_x509_certificate(shown.certificate)
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert {"localhost", "gpubox.example"} <= set(names.get_values_for_type(x509.DNSName))
    addresses = set(names.get_values_for_type(x509.IPAddress))
    assert {ipaddress.ip_address(one) for one in ("127.0.0.1", "10.1.2.3")} <= addresses


def test_what_was_half_made_is_made_again(places: Places) -> None:
    places.ca_key.write_bytes(b"half")
    (places.home / ".tmp-credentials").mkdir()
    (places.home / ".tmp-credentials" / "ca.crt").write_bytes(b"half")
    assert isinstance(server_credentials(places), ServerCredentials)
    assert not (places.home / ".tmp-credentials").exists()


def test_another_daemons_are_not_taken_for_ones_own(places: Places, tmp_path: Path) -> None:
    server_credentials(places)
    other = Places(tmp_path / "laptop")
    other.make()
    shutil.copytree(places.credentials, other.credentials)
    with pytest.raises(PlaceError, match="is of another daemon"):
        server_credentials(other)


@pytest.mark.parametrize("name", ["credentials/token", "ca.key"])
def test_open_secrets_are_refused(places: Places, name: str) -> None:
    server_credentials(places)
    (places.home / name).chmod(0o640)
    with pytest.raises(PlaceError, match=f"{name} can be read by others"):
        server_credentials(places)


@pytest.mark.parametrize("content", ["", "ft_short", f"a password of {'x' * 43}"])
def test_a_token_that_is_none_is_refused(places: Places, content: str) -> None:
    server_credentials(places)
    (places.credentials / "token").write_text(content)
    with pytest.raises(PlaceError, match="holds no token"):
        server_credentials(places)


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("gpubox", False),
        ("localhost.example", False),
    ],
)
def test_loopback(host: str, only_here: bool) -> None:
    assert is_loopback(host) is only_here


def test_without_cryptography_the_way_to_it_is_one_that_exists(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("firetitan_daemon.certificates", raising=False)
    monkeypatch.setitem(sys.modules, "firetitan_daemon.certificates", None)
    with pytest.raises(PlaceError, match=r"in its folder: pip install '\.\[daemon\]'"):
        server_credentials(places)
