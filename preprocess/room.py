"""An output folder that cannot be written to: full, over a quota, read-only, not ours. It ends the run, not a video."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from av.error import FFmpegError

_REMEDY = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`), or take a file system without one",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "get permission to write there",
    errno.EPERM: "get permission to write there",
}
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # reading gives none of these


class OutputError(OSError):
    """The output cannot be written. What is done is kept, and no video is blamed."""

    def __str__(self) -> str:
        return str(self.strerror)


def no_room(folder: Path, error: OSError) -> OutputError:
    """Says of an error in writing which folder cannot be written, why, and what to do."""
    if isinstance(error, OutputError):
        return error
    number = error.errno or 0
    why = os.strerror(number) if number else str(error)  # pyarrow and fsspec word it at length
    remedy = _REMEDY.get(number, "name another output")
    words = f"{folder} cannot be written ({why}); what is done is kept there: {remedy} and start the same command again"
    return OutputError(number, words)


def is_about(error: OSError, *folders: Path) -> bool:
    """Whether an error says that files in `folders` cannot be written, rather than that a source cannot be read."""
    if isinstance(error, FFmpegError):  # some are OSErrors and tell of a damaged file: FFmpeg writes nothing here
        return False
    if error.errno in _WRITING:
        return True
    name = error.filename2 or error.filename  # of a rename, the target
    if error.errno not in (errno.EACCES, errno.EPERM) or not isinstance(name, str | bytes | os.PathLike):
        return False
    return any(Path(os.fsdecode(name)).is_relative_to(folder) for folder in folders)


@contextmanager
def writing(output: Path, *folders: Path) -> Iterator[None]:
    """Turns errors in writing to `output`, or in it to `folders`, into an OutputError; leaves all others."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError) or not is_about(error, *folders or (output,)):
            raise
        raise no_room(output, error) from error
