"""Files that are written as a whole or not at all."""

import os
import stat

import pytest

from pykvm.errors import ConfigError
from pykvm.wholefile import check_place, replace_file


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    replace_file(str(path), lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(str(path), fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_nothing_is_put_in_the_place_of_a_pipe(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    try:
        check_place("--html", path)
        replace_file(path, lambda file: file.write(b"page"))
        assert os.read(reader, 10) == b"page"
        assert stat.S_ISFIFO(os.stat(path).st_mode)
    finally:
        os.close(reader)


def test_a_place_that_is_none(tmp_path):
    check_place("--html", str(tmp_path / "x"))
    for place, why in ((tmp_path / "none" / "x", "no folder"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=why):
            check_place("--html", str(place))
