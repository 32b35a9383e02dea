"""Host and Origin headers."""

from __future__ import annotations

import pytest

from retnet.serve.http.access.hosts import AllowedHosts, is_loopback
from retnet.serve.http.errors import ApiError


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("localhost.:8000", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:8000@evil.example", False),
        ("192.168.1.5:8000", False),
        ("", False),
        ("localhost:", False),
        ("[::1", False),
        ("local host", False),
    ],
)
def test_a_server_on_loopback_answers_to_names_of_this_machine_only(host, accepted):
    hosts = AllowedHosts("127.0.0.1")
    if accepted:
        hosts.check([host.encode()], [])
    else:
        with pytest.raises(ApiError, match="--allowed-host") as caught:
            hosts.check([host.encode()], [])
        assert caught.value.status == 403


def test_one_host_header_is_needed():
    for values in ([], [b"localhost", b"localhost"]):
        with pytest.raises(ApiError, match=f"{len(values)} Host headers"):
            AllowedHosts("127.0.0.1").check(values, [])


def test_a_server_on_all_addresses_answers_to_addresses_and_named_hosts():
    hosts = AllowedHosts("0.0.0.0", ["chat.example.org"])
    for host in (b"10.1.2.3:8000", b"[2001:db8::1]", b"chat.example.org", b"Chat.Example.Org:443"):
        hosts.check([host], [])
    with pytest.raises(ApiError):
        hosts.check([b"evil.example"], [])
    AllowedHosts("127.0.0.1", ["*"]).check([b"evil.example"], [])


def test_a_page_of_another_site_may_change_nothing():
    hosts = AllowedHosts("127.0.0.1", origins=["https://chat.example.org/"])
    for origin in (b"http://localhost:8000", b"https://localhost:8000", b"https://chat.example.org"):
        hosts.check([b"localhost:8000"], [origin])
    for origin in (
        b"null",
        b"http://evil.example",
        b"http://localhost:9000",
        b"http://localhost:8000.evil.example",
        b"",
    ):
        with pytest.raises(ApiError, match="another site") as caught:
            hosts.check([b"localhost:8000"], [origin])
        assert caught.value.status == 403


def test_loopback_addresses_are_told_from_public_ones():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))
