"""Reading files of data sets: whole and unchanged, or an error that names the file."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path


class DataError(ValueError):
    """A file of a data set that is missing, damaged, or not what its name says."""


def find(folder: Path, *names: str) -> Path:
    """The first of these files that is in the folder.

    Raises DataError that lists the names and what is there instead.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; expected one that holds {' or '.join(names)}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = sorted(entry.name for entry in folder.iterdir())[:8]
    raise DataError(f"{folder} holds {', '.join(present) or 'nothing'}; expected {' or '.join(names)}")


def read(path: Path, md5: str | None = None) -> bytes:
    """A file's bytes, unpacked where it ends in .gz.

    Raises DataError if it cannot be read or unpacked, or if its MD5 sum (before unpacking) is not the published one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if md5 is not None:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(
                f"{path} has {len(content)} bytes with the MD5 sum {found}; expected the published file's, {md5} "
                "(checksums=False reads it all the same)"
            )
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from None
