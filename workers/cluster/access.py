"""Access to Ray clusters: which token to show, and which clusters may be joined without one.

Whoever reaches an open cluster runs code there, so a cluster of another machine must ask for a token. Ray's token is in
RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token, and nowhere in a configuration, on
a command line or in a record.
"""

import ipaddress
import logging
import os
import sys
from pathlib import Path

import grpc

from workers.cluster.own_cluster import own_cluster
from workers.errors import ClusterError

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
ASK_HEAD = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # the first call of every client of a Ray head
ASK_CLIENT_SERVER = "/ray.rpc.RayletDriver/ClusterInfo"  # of ray://; answers an empty request with NOT_FOUND


def auth_token() -> str | None:
    """Return the token of this user's clusters, looked up in the order that Ray uses; None if there is none.

    Raises ClusterError if the file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        if named:
            raise ClusterError(f"expected a token in the file of RAY_AUTH_TOKEN_PATH, found none at {path}") from None
        return None


def is_loopback(host: str) -> bool:
    """Return whether ``host`` can be nothing but this machine; names other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_protection(address: str, host: str, protected: bool, insecure: bool, remedy: str) -> str | None:
    """Return the token to show at ``address``; None if its cluster asks for none.

    ``protected`` says whether it does. Raises ClusterError if there is no token to show, and for an open cluster of
    another machine unless ``insecure``; ``remedy`` tells the user how to allow that.
    """
    if not protected:
        if insecure or is_loopback(host):
            return None
        raise ClusterError(
            f"expected token authentication at {address}, found an open cluster where anybody who reaches it runs "
            f"code: start it with RAY_AUTH_MODE=token, or {remedy}"
        )
    token = auth_token()
    if token is None:
        raise ClusterError(f"expected the token of the cluster at {address} in {TOKEN_PLACES}, found none")
    return token


def admitted_address(address: str, insecure: bool = False) -> str:
    """Return ``address`` as ray.init takes it, once its cluster has answered and let this user in.

    "local" starts a cluster; "auto" is the cluster that RAY_ADDRESS names, else "local", and never any other that
    happens to be there: RAY_ADDRESS=auto is the one that this user has started. Raises ClusterError within
    ``TIMEOUT_S`` seconds if nobody is at the address, if the token is missing or wrong, or if the cluster is open,
    another machine's, and not said to be ``insecure``.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "local"
        if address == "auto":
            address = own_cluster()
        if address != "local":
            log.info("taking the Ray cluster at %s, by RAY_ADDRESS", address)
    if address == "local":
        if "RAY_AUTH_MODE" not in os.environ:
            use_token()
        return address
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"expected workers.ray to be auto, local, off or HOST:PORT, found {address!r}")
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        protected = not _let_in(channel, address, None)
        token = check_protection(address, host, protected, insecure, "set workers.insecure: true to join it anyway")
        if token is not None:
            if not _let_in(channel, address, token):
                raise ClusterError(
                    f"expected the token of the cluster at {address} in {TOKEN_PLACES}, found one that it refuses"
                )
            use_token()
    return address


def use_token() -> None:
    """Make Ray in this process and its children show the token, and make clusters that they start ask for it."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if ray := sys.modules.get("ray"):  # it has already read the environment; ray.init makes it read again in this way
        ray._raylet.Config.initialize("")


def _let_in(channel: grpc.Channel, address: str, token: str | None) -> bool:
    """Return whether the cluster at ``address`` accepts a client with this token.

    Raises ClusterError if there is no cluster.
    """
    call = channel.unary_unary(ASK_CLIENT_SERVER if address.startswith("ray://") else ASK_HEAD)
    try:
        call(b"", timeout=TIMEOUT_S / 2, metadata=[("authorization", f"Bearer {token}")] if token else [])
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return False
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return True
        found = f"{error.code().name.lower()}: {' '.join(error.details().split())}"
        raise ClusterError(f"expected a Ray cluster at {address}, found nobody there ({found})") from None
    return True
