"""A socket of the server's own, and room for many clients at it."""

from __future__ import annotations

import errno
import resource
import socket

from llmsparse.errors import MachineError, RecipeError

MOST_FILES = 65536  # each client is one


def allow_many_clients() -> None:
    """As many connections as the machine lets a process have: those that only wait must not keep others out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address. RecipeError for a host that is none, MachineError for a port that is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise RecipeError(f"--host {host}: no such address ({error})") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, error) from error
    return bound


def cannot_listen(host: str, port: int, error: OSError) -> MachineError:
    if error.errno == errno.EADDRINUSE:
        return MachineError(f"port {port} of {host} is in use; choose another with --port, or 0 for a free one")
    return MachineError(f"cannot listen on port {port} of {host}: {error.strerror}; choose another --port or --host")
