"""Unix sockets to listen on that nobody but their owner may use, from the first moment on.

``unix:PATH`` is how users name them. A socket that a killed process has left is replaced; one that somebody listens on, and any other
file, is not.
"""

from __future__ import annotations

import os
import socket
from struct import pack

from pykvm.errors import ConfigError

__all__ = ["UnixListener", "connect", "path_of"]


def path_of(where: str, option: str = "") -> str:
    """The path in ``unix:PATH``. Raises ConfigError, which names ``option``."""
    path = where.removeprefix("unix:")
    if path == where or not path:
        raise ConfigError(f"{option} {where!r}: give unix:PATH, such as unix:/tmp/guest.socket".lstrip())
    if len(os.fsencode(path)) > 107:  # sun_path of <linux/un.h>, less its end
        raise ConfigError(f"{option} {where!r}: a unix socket's path has at most 107 bytes".lstrip())
    return path


def connect(path: str, timeout: float = 5.0) -> socket.socket:
    """A blocking socket that is connected to who listens at ``path``. Raises OSError, also when nobody has accepted in ``timeout``."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Blocking: without, a listener that is merely busy would be EAGAIN at once.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, pack("@ll", int(timeout), int(timeout % 1 * 1e6)))
        connected.connect(path)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, pack("@ll", 0, 0))
    except BaseException:
        connected.close()
        raise
    return connected


class UnixListener:
    """Listens at ``path``, a context manager; ``socket`` accepts. The file goes with it. Raises OSError: it cannot be, or is in use."""

    def __init__(self, path: str, backlog: int = 1) -> None:
        from fcntl import LOCK_EX, flock

        self.path = os.path.abspath(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = -1
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # what bind() gives the file, less the umask
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            flock(folder, LOCK_EX)  # of two that find the same stale socket, one replaces it
            _remove_stale(self.path)
            self.socket.bind(path)
            self.socket.listen(backlog)
            found = os.lstat(path)
            self._inode = (found.st_dev, found.st_ino)
        except BaseException:
            self.socket.close()
            raise
        finally:
            if folder >= 0:
                os.close(folder)

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._inode:
                os.unlink(self.path)
        except OSError:
            pass

    def __enter__(self) -> UnixListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_stale(path: str) -> None:
    import stat

    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        connect(path, 1.0).close()
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass
