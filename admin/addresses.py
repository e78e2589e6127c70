"""Addresses of coordinators: what is none, and to which of them no token is sent."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

import httpx

from protocol import errors


def check_transport(url: str, *, insecure: bool) -> None:
    """Raises InvalidRequest for what is no address, InsecureTransport if a token could be read on the way."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise errors.InvalidRequest(f"{url!r} is no address ({error}); http://host:port or https://host was expected") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise errors.InvalidRequest(f"{url!r} is no address; http://host:port or https://host was expected")
    if address.scheme == "http" and not insecure and not loopback(address.host):
        raise errors.InsecureTransport(
            f"{url} is not HTTPS, so the token would travel in the clear; use https://, or set HLORA_INSECURE=1 on a network you trust"
        )


def trusting(ca_file: Path) -> ssl.SSLContext:
    """What trusts these certificates alone. Raises InvalidRequest for a file that holds none."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # also what is no PEM
        raise errors.InvalidRequest(f"HLORA_CA_FILE: {ca_file} holds no certificates as PEM ({error.strerror or error})") from None


def loopback(host: str) -> bool:
    """Whether it is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
