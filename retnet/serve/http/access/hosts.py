"""Host and Origin headers: which names this server answers to, and whose pages may change its state.

A page of another site can reach a server on this machine. If it resolves its own name to 127.0.0.1 (DNS rebinding), the
browser takes both for one site, but the Host header still has the other name. If it posts across sites, the Origin
header names it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from retnet.serve.http.errors import ApiError
from retnet.system.checks import quoted

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_HOST = "*"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+)(:\d{1,5})?")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address that a server is bound to."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class AllowedHosts:
    """The names of one server, and the origins whose pages may change its state.

    bound: the address that it listens on. Bound to every address, it answers to every literal IP address, which no
    name can be rebound to, and to the machine's own name. hosts: further names; "*" for any.
    origins: beside the server's own, such as "https://chat.example.org" of a proxy in front of it.
    """

    def __init__(self, bound: str, hosts: Sequence[str] = (), origins: Sequence[str] = ()):
        self._names = {host.lower().strip("[]") for host in hosts} | {bound.lower()} | LOOPBACK_NAMES
        self._any_name = ANY_HOST in self._names
        self._any_address = bound in ("", "0.0.0.0", "::")
        if self._any_address:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, hosts: Sequence[bytes], origins: Sequence[bytes]) -> None:
        """Raise ApiError for the headers of a request that came through another site's name or page."""
        if len(hosts) != 1:
            raise ApiError(400, f"the request has {len(hosts)} Host headers; accepted: one")
        host = hosts[0].decode("latin-1").lower()
        if not self._names_this_server(host):
            raise ApiError(
                403,
                f"the Host header is {quoted(host)}, which is not a name of this server; to accept it, start the "
                "server with --allowed-host",
                code="host_not_allowed",
            )
        for value in origins:
            origin = value.decode("latin-1").lower()
            if origin not in (f"http://{host}", f"https://{host}") and origin not in self._origins:
                raise ApiError(
                    403,
                    f"the Origin header is {quoted(origin)}, another site than this server's; to accept it, start the "
                    "server with --allowed-origin",
                    code="origin_not_allowed",
                )

    def _names_this_server(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".")
        return self._any_name or name in self._names or (self._any_address and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
