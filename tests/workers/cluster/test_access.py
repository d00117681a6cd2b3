"""Which clusters are joined: against real gRPC servers that ask for a token as a Ray head does, or do not."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.conftest import let_ray_read_environment
from workers.cluster.access import ASK_HEAD, admitted_address, auth_token, check_protection, is_loopback
from workers.errors import ClusterError


@contextmanager
def head(token: str | None) -> Iterator[str]:
    """Address of a server that answers a head's first call to who shows ``token``."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if token and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    service, _, method = ASK_HEAD.lstrip("/").partition("/")
    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


@pytest.fixture
def read_again() -> Iterator[None]:
    """Afterwards Ray reads the environment again, as it is for the tests behind this one."""
    yield
    let_ray_read_environment()


@pytest.fixture
def user(read_again: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    """Make this process a user with that token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that it ends with the test whatever the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def become(token: str | None) -> None:
        if token:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)

    return become


def test_a_cluster_lets_in_who_has_its_token(user: Callable[[str | None], None]) -> None:
    user("right")
    with head("right") as address:
        assert admitted_address(address) == address


@pytest.mark.parametrize(("token", "found"), [(None, "found none"), ("wrong", "found one that it refuses")])
def test_a_missing_and_a_wrong_token_are_told_apart(
    token: str | None, found: str, user: Callable[[str | None], None]
) -> None:
    user(token)
    with head("right") as address, pytest.raises(ClusterError, match=found) as refused:
        admitted_address(address)
    assert "right" not in str(refused.value) and "wrong" not in str(refused.value)


def test_an_open_cluster_of_this_machine_is_joined_and_another_ones_only_if_told_so(
    user: Callable[[str | None], None],
) -> None:
    user("mine")
    with head(None) as address:
        assert admitted_address(address) == address
    with pytest.raises(ClusterError, match="found an open cluster .* RAY_AUTH_MODE=token, or give --insecure"):
        check_protection("head:6379", "head", protected=False, insecure=False, remedy="give --insecure")
    assert check_protection("head:6379", "head", protected=False, insecure=True, remedy="") is None


def test_auto_is_the_cluster_that_the_environment_names(
    user: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    user("right")
    with head("right") as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert admitted_address("auto") == address


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "192.0.2.1:6379"])
def test_a_dead_address_is_refused_within_15_seconds(address: str, user: Callable[[str | None], None]) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=f"expected a Ray cluster at {address}, found nobody there"):
        admitted_address(address)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("address", ["cluster", "head:", ":6379"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match=f"to be auto, local, off or HOST:PORT, found '{address}'"):
        admitted_address(address)


def test_only_names_and_numbers_of_this_machine_are_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "[::1]", "::1")))
    assert not any(map(is_loopback, ("localhost.example.org", "10.0.0.1", "head", "0.0.0.0", "[fe80::1]")))


def test_the_token_is_sought_where_ray_seeks_it(
    user: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert auth_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home folder\n")
    assert auth_token() == "of the home folder"
    (tmp_path / "token").write_text("of the file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert auth_token() == "of the file"
    user("of the variable")
    assert auth_token() == "of the variable"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ClusterError, match=f"in the file of RAY_AUTH_TOKEN_PATH, found none at {tmp_path}/nowhere"):
        auth_token()
