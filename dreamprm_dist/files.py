"""Files that appear whole or not at all, JSON lines that survive a kill, and file hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dreamprm_dist.errors import InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"
# Names beside an output that are written or cleared before it is whole.
_UNFINISHED = ("", ".tmp", ".new", ".old")


def refuse_overwriting(
    outputs: Iterable[Path], inputs: Iterable[str | Path | None], into: Path | None = None
) -> None:
    """Refuse to write where an input lies, however the two are spelled.

    Files are compared by what they are and not by name: links, hard links and letter case that the
    file system ignores do not hide them.

    Args:
        outputs: files and folders that are about to be replaced.
        inputs: files and folders that are read; what is not there (a hub name), and None, is not.
        into: a folder that the outputs go into; its other files stay.

    Raises:
        InputError: an input is an output, or lies in one, or is the folder `into`.
    """
    names = (Path(f"{path}{end}") for path in outputs for end in _UNFINISHED)
    there = [name for name in names if name.exists()]
    for given in filter(None, inputs):
        path = Path(str(given))
        places = {path, *path.absolute().parents, *path.resolve().parents}
        for output in there:
            if any(_is_same(place, output) for place in places):
                raise InputError(
                    f"{output}: this would overwrite the input {path}; choose another name."
                )
        if into and _is_same(path, into):
            raise InputError(f"{into}: is read as an input; choose another folder to write into.")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


@contextlib.contextmanager
def whole_file(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """Give a name to write a file under, which takes `path`'s place when the block ends well.

    A reader of `path` sees all of it or what was there before.

    Args:
        unfinished: the name, by default `<path>.tmp`.
    """
    unfinished = unfinished or path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that appears whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder, which takes `path`'s place when the block ends well."""
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is not, against other processes within the block.

    The system drops the lock when the process ends, whatever ends it. It also holds against other
    machines where their file system has locks.

    Raises:
        InputError: another process holds it, which is named, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to write into")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            # Not `flock`: forked workers would hold it too, and may outlive their rank.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise in_use(folder, file.read()) from None
        except OSError as error:
            logger.warning("%s: no lock (%s); see that no other run writes here", folder, error)
        file.truncate(0)
        file.write(this_process())
        file.flush()
        yield


def this_process() -> str:
    """What a lock says of who holds it."""
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def in_use(folder: Path, holder: str) -> InputError:
    """The refusal of a folder that another process holds."""
    return InputError(
        f"{folder} is in use by {holder.strip() or 'another run'}; wait for its end, end it, or "
        "choose another folder"
    )


def json_line(row: Mapping) -> str:
    """A line of JSONL, in plain ASCII: half a surrogate pair cannot be written as UTF-8."""
    return json.dumps(row) + "\n"


def whole_lines(path: Path) -> list[str]:
    """The lines of a file but one that a killed process has not written to its end."""
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return whole


class JsonLines:
    """JSONL that is added to, and that a kill leaves usable: half a line is cut off.

    Args:
        lock: refuse a file that another process has opened so.

    Raises:
        InputError: another process is writing the file.
    """

    def __init__(self, path: Path, lock: bool = False):
        self._file = path.open("a+b")
        if lock:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise InputError(f"{path}: another run is writing it; wait for its end") from None
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))

    def add(self, row: Mapping) -> None:
        """Write a row; when this returns, a kill does not lose it."""
        self._file.write(json_line(row).encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def flush(path: Path) -> None:
    """Have a file or a folder on the disk itself, so that it outlives the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hex; reads it in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
