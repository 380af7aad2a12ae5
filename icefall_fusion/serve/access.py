"""Who may use a server: a token, and for a local one no other website.
Knows: headers, addresses, tokens. Must not know: streams, messages.

A browser lets every website open a socket to 127.0.0.1. So without a token the page that opens one must come
from this machine by name (header Origin), and so must the name under which the server is asked (Host): a
website could let its own name mean 127.0.0.1.
"""
from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path
from typing import Mapping, Optional
from urllib.parse import urlsplit

from icefall_fusion.common.checks import check


class Access:
    """Tells whether a request may use the server.

    Args:
        host: address that the server listens on.
        token: that clients must give; or ``@FILE``, whose first line is it; empty: none.

    Raises:
        ValueError: an address other than this machine's own without a token, or one that is too short.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, host: str, token: str = "") -> None:
        if token.startswith("@"):
            lines = Path(token[1:]).read_text(encoding="utf-8").split("\n")
            token = lines[0].strip()
            check(bool(token), "token", "stand in the first line of its file", "an empty line")
        check(not token or len(token) >= 8, "token", "have at least 8 characters", f"of {len(token)}")
        rule = "be given where others than this machine can reach the server"
        check(bool(token) or is_local(host), "token", f"{rule} (host {host})", "")
        self._token = token.encode()

    @property
    def needs_token(self) -> bool:
        """Whether a token must be given."""
        return bool(self._token)

    def knows(self, token: str) -> bool:
        """Return whether a token is the right one; the time that it takes tells nothing."""
        return bool(self._token) and hmac.compare_digest(self._token, token.encode("utf-8", "surrogatepass"))

    def token_of(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        """Return the token of a request: of its header Authorization, or ``token`` of its query; or "" ."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        return token.strip() if kind.lower() == "bearer" else query.get("token", "")

    def refusal(self, headers: Mapping[str, str]) -> Optional[str]:
        """Return why a request without a token is refused; None: it is from here."""
        host = _host_of(f"//{headers.get('host', '')}")
        if not is_local(host):
            return f"the server must be asked as localhost, but was asked as {host[:80]!r}"
        origin = headers.get("origin")
        if origin is not None and not is_local(_host_of(origin)):
            return f"pages of {origin[:80]!r} may not use this server"
        return None


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # half an IPv6 address
        return ""


def is_local(host: str) -> bool:
    """Return whether a host is this machine by its loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
