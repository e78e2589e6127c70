"""Addresses that a secret is sent to: what is none, and to which of them it could be read on the way."""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from protocol import errors


def check_transport(url: str, *, travelling: str, allowing: str | None) -> None:
    """Raises InvalidRequest for what is no address, InsecureTransport if what travels there could be read on the way.

    allowing: the variable that allows it all the same; none where it is allowed.
    """
    address = _split(url)
    if address is None:
        raise errors.InvalidRequest(f"{url!r} is no address of a coordinator; http://host:port or https://host was expected")
    if address.scheme == "http" and allowing and not loopback(address.hostname or ""):
        raise errors.InsecureTransport(
            f"{url} is not HTTPS, so the {travelling} would travel in the clear; use https://, or set {allowing}=1 on a network you trust"
        )


def trusting(ca_file: Path, *, variable: str) -> ssl.SSLContext:
    """What trusts these certificates alone. Raises InvalidRequest for a file that holds none, which a variable named."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # also what is no PEM
        raise errors.InvalidRequest(f"{variable}: {ca_file} holds no certificates as PEM ({error.strerror or error})") from None


def loopback(host: str) -> bool:
    """Whether it is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str) -> SplitResult | None:
    """The parts of an HTTP address; none where it is no such address."""
    try:
        found = urlsplit(url)
        _ = found.port  # raises for what is no number
    except ValueError:
        return None
    whole = found.scheme in ("http", "https") and url.isprintable() and _is_host(found.hostname or "", literal="[" in found.netloc)
    return found if whole else None


def _is_host(name: str, *, literal: bool) -> bool:
    """Whether it is a host's name, in ASCII (an international one as xn--…), or an address, which in brackets is of IPv6."""
    if literal:
        try:
            return ipaddress.ip_address(name).version == 6
        except ValueError:
            return False
    return re.fullmatch(r"[A-Za-z0-9._-]+", name) is not None
