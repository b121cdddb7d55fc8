"""Where gdb connects to: a TCP port of the loopback, or a unix socket that nobody but its owner may use.

Whoever is connected reads and writes the guest and the image, nothing else of this host. Every user of the machine can connect to a port of
the loopback: on a machine with others, use a unix socket.
"""

from __future__ import annotations

import socket

from pykvm.errors import ConfigError
from pykvm.unixsocket import UnixListener

__all__ = ["Listener"]


class Listener:
    """``where``: "127.0.0.1:1234", ":1234", "[::1]:1234" or "unix:PATH"; port 0 takes any that is free. A context manager.

    ``name`` is what gdb's ``target remote`` takes. Raises ConfigError: no address, in use, or not of the loopback without ``remote``.
    """

    def __init__(self, where: str, *, remote: bool = False) -> None:
        self.path = ""
        self._listener: UnixListener | None = None
        try:
            if where.startswith("unix:"):
                self.socket = self._unix(where.removeprefix("unix:"))
            else:
                self.socket = self._tcp(where, remote)
        except OSError as error:
            raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from None

    def _tcp(self, where: str, remote: bool) -> socket.socket:
        host, colon, port = where.rpartition(":")
        host = host.strip("[]") or "127.0.0.1"
        if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError(f"no address to listen on: {where!r}; give HOST:PORT, such as 127.0.0.1:1234, or unix:PATH")
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        if not remote and not _is_loopback(str(address[0])):
            raise ConfigError(
                f"{where}: {address[0]} is not of the loopback; who connects there owns the guest: add --remote if you mean it"
            )
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1)
        except BaseException:
            listening.close()
            raise
        host, number = listening.getsockname()[:2]
        self.name = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
        return listening

    def _unix(self, path: str) -> socket.socket:
        if not path:
            raise ConfigError("--listen unix: a path is missing, as in unix:/tmp/guest.gdb")
        self._listener = UnixListener(path)
        self.name = self.path = self._listener.path
        return self._listener.socket

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_loopback(address: str) -> bool:
    from ipaddress import ip_address

    return ip_address(address.partition("%")[0]).is_loopback
