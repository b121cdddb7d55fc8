"""The files of an exit ledger: FILE.npy has the records, for np.load; FILE.json beside it what else is known of them.

A file may come from anyone: everything is checked before it is used, and pickles are never read. Files are replaced as a whole.
"""

from __future__ import annotations

import json
import os
import warnings
from zlib import crc32

import numpy as np

from pykvm.errors import ConfigError
from pykvm.wholefile import replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from pykvm.kvmstats import Snapshot

    Array = NDArray[Any]

__all__ = [
    "RECORD_DTYPE",
    "as_mapping",
    "as_number",
    "as_snapshot",
    "checksum",
    "json_path",
    "read_json",
    "read_records",
    "write_json",
    "write_records",
]

RECORD_DTYPE = np.dtype(
    [
        ("tsc_before", "<u8"), ("tsc_after", "<u8"), ("tsc_handled", "<u8"), ("rip", "<u8"), ("qualifier", "<u8"), ("value", "<u8"),
        ("reason", "<u4"), ("count", "<u4"), ("vcpu", "<u2"), ("size", "u1"), ("is_write", "u1"), ("reserved", "<u4"),
    ]
)  # fmt: skip
_JSON_LIMIT = 64 << 20


def json_path(path: str) -> str:
    """Where the .json of a ledger is: FILE.npy has FILE.json."""
    return path.removesuffix(".npy") + ".json"


def read_records(path: str) -> Array:
    """The records in an .npy file. Raises ConfigError for anything else."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                version = np.lib.format.read_magic(file)
                if version == (1, 0):
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                elif version == (2, 0):
                    shape, _, dtype = np.lib.format.read_array_header_2_0(file)
                else:
                    raise ValueError(f"version {version[0]}.{version[1]} of the format")
            except OSError:
                raise
            except Exception as error:  # the header is a Python expression: there is no end to what may be wrong with it
                raise ConfigError(f"{path}: not a ledger: no .npy file ({_first_line(error)})") from None
            if dtype != RECORD_DTYPE:
                raise ConfigError(f"{path}: not a ledger: an .npy file of something else than exit records")
            if len(shape) != 1:
                raise ConfigError(f"{path}: not a ledger: an array of {len(shape)} dimensions")
            want, have = shape[0] * RECORD_DTYPE.itemsize, os.fstat(file.fileno()).st_size - file.tell()
            if want != have:
                what = "cut off" if have < want else "too long"
                raise ConfigError(f"{path}: {what}: {shape[0]} records take {want} bytes, here are {have}")
            data = file.read(want)
            if len(data) != want:
                raise ConfigError(f"{path}: cut off while it was read")
            return np.frombuffer(data, RECORD_DTYPE)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: str) -> dict[str, Any] | None:
    """What is beside it, None when there is nothing. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            data = file.read(_JSON_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _JSON_LIMIT:
        raise ConfigError(f"{path}: too long for what belongs to a ledger")
    try:
        about = json.loads(data)
        if not isinstance(about, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not what belongs to a ledger: {error}") from None
    return about


def as_number(value: object) -> int:
    """An unsigned 64-bit number, or ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{str(value)[:40]!r} is no 64-bit number")
    return value


def as_text(value: object) -> str:
    """A text that a terminal can be shown, or ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return "".join(c if c.isprintable() else "?" for c in value)


def as_mapping(value: object) -> dict[str, Any]:
    """A JSON object, or ValueError."""
    if not isinstance(value, dict):
        raise ValueError("there is something else than an object")
    return value


def as_snapshot(value: object) -> Snapshot:
    """Counters as kvmstats.snapshot() has them, or ValueError."""
    return {
        kind: [
            {as_text(name): [as_number(v) for v in n] if isinstance(n, list) else as_number(n) for name, n in as_mapping(counters).items()}
            for counters in several
        ]
        for kind, several in as_mapping(value).items()
    }


def checksum(records: Array) -> int:
    """CRC-32 of the records, which ties the two files together."""
    return crc32(records.view(np.uint8).data)


def write_records(path: str, records: Array) -> None:
    """Raises OSError."""
    replace_file(path, lambda file: np.lib.format.write_array(file, records, version=(1, 0), allow_pickle=False))


def write_json(path: str, about: dict[str, Any]) -> None:
    """Raises OSError."""
    replace_file(path, lambda file: file.write(json.dumps(about).encode()))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
