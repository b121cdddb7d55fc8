"""Unix sockets that only their owner may use, from the first moment on."""

import os
import socket
import stat
from threading import Barrier, Thread

import pytest

from pykvm import ConfigError
from pykvm.unixsocket import UnixListener, connect, path_of


def test_only_the_owner_may_connect_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        with UnixListener(str(tmp_path / "s")) as listener:
            assert stat.S_IMODE(os.stat(listener.path).st_mode) == 0o600
            connect(listener.path).close()
            assert os.umask(0) == 0  # the process's own is left alone
    finally:
        os.umask(before)
    assert not os.path.exists(tmp_path / "s")


def test_a_stale_one_is_replaced(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with UnixListener(str(tmp_path / "s")) as listener:
        connect(listener.path).close()


def test_a_live_one_and_a_file_are_not(tmp_path):
    with UnixListener(str(tmp_path / "s")) as listener:
        with pytest.raises(OSError, match="in use"):
            UnixListener(listener.path)
        connect(listener.path).close()
    (tmp_path / "s").write_text("a file")
    with pytest.raises(OSError, match="in use"):
        UnixListener(str(tmp_path / "s"))
    assert (tmp_path / "s").read_text() == "a file"


def test_of_many_that_find_a_stale_one_one_wins(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    barrier, won, lost = Barrier(8), [], []

    def race():
        barrier.wait()
        try:
            won.append(UnixListener(path, backlog=16))
        except OSError as error:
            lost.append(error)

    threads = [Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    connect(path).close()
    won[0].close()


def test_a_listener_that_is_busy(tmp_path):
    """Its queue is full: it is waited for, and it is not taken for a dead one."""
    with UnixListener(str(tmp_path / "s"), backlog=0) as listener:
        with connect(listener.path), pytest.raises(OSError, match="temporarily unavailable"):
            for _ in range(3):
                connect(listener.path, 0.1)
        with pytest.raises(OSError, match="in use"):
            UnixListener(listener.path)


def test_what_has_taken_its_place_is_left_alone(tmp_path):
    with UnixListener(str(tmp_path / "s")):
        os.unlink(tmp_path / "s")
        (tmp_path / "s").write_text("somebody else's")
    assert (tmp_path / "s").read_text() == "somebody else's"


def test_paths():
    assert path_of("unix:/tmp/x") == "/tmp/x"
    for where in ("/tmp/x", "unix:", "tcp:localhost:1", ""):
        with pytest.raises(ConfigError, match=r"^--to '.*': give unix:PATH"):
            path_of(where, "--to")
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        path_of("unix:" + "ü" * 60)
