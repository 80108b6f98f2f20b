"""Whether a cluster can be reached, and what to say where it cannot."""

import socket
from typing import Final

CONNECT_SECONDS: Final = 10
_TOO_LONG: Final = "AF_UNIX path"  # Ray's words, and Python's, for a socket whose path has more than 107 bytes


def check_listening(address: str) -> None:
    """Raise OSError where nobody listens at `host:port`: Ray would try for minutes. Other forms are left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def not_reached(address: str | None, error: Exception) -> str:
    """The message for an address, or for none, where `error` came of it."""
    if address is None and _TOO_LONG in str(error):
        return (
            f"executor.kind: Ray did not start on this machine: its sockets lie below the folder for temporary files, "
            f"whose path is too long for them ({error}); set RAY_TMPDIR to a short folder, such as /tmp, or use "
            "--executor inline"
        )
    if address is None:
        return (
            f"executor.kind: Ray did not start on this machine ({error}); try again when it is less busy, or use "
            "--executor inline"
        )
    return (
        f"executor.address: cannot reach a Ray cluster at {address!r} ({error}); start one with `ray start --head`, "
        "give the right --ray-address, or leave it out to run on this machine; a cluster with token authentication "
        "needs RAY_AUTH_MODE=token and its token here, too"
    )
