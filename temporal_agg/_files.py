"""Files that other programs, editors and killed processes leave behind: written whole or not at all, read with care."""

import glob
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Busy",
    "locked",
    "print_any_name",
    "read_json",
    "read_number",
    "read_text",
    "replace_file",
    "sweep",
    "utf8_name",
]

ABANDONED = 24 * 3600  # seconds after which something temporary is taken for a dead process's where locks do not work
UMASK = 0o666  # before what the umask takes away

# What stands at the start of a file that says how its text is encoded; the longer marks first.
MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class Busy(OSError):
    """Another process is at work on the same files."""


def replace_file(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a file, which then takes the place of ``path`` in one step, if nothing failed.

    The file is made in a folder of its own beside ``path``, whose name nobody can know before. What processes that were
    killed at the same ``path`` have left is removed.

    Args:
        path: what is made or replaced.
        write: called with the path to write to, which has the name of ``path`` and does not exist yet.

    Raises:
        OSError: with the name of ``path``, if it cannot be written (a full disk, no permission).
    """
    path = Path(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _named(error, path) from error
    try:
        with _held(folder):
            sweep(path.parent, path.name)
            temporary = folder / path.name
            write(temporary)
            temporary.chmod(UMASK & ~_umask(folder))  # safetensors lets nobody else read its files
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: str | os.PathLike, name: str = "*") -> None:
    """Removes what killed processes left in ``folder`` while they wrote the file ``name`` there (``*``: any file)."""
    name = name if name == "*" else glob.escape(name)
    for left in Path(folder).glob(f".{name}.*.tmp"):
        if left.is_dir() and not left.is_symlink() and _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Holds the file ``path`` (made if it is not there, empty, and removed at the end) for this process alone.

    The lock ends with the process, however it ends. Where the disk knows no locks, nothing is held.

    Args:
        path: of the lock.
        what: what the message says is in use.

    Raises:
        Busy: another process holds it.
    """
    path = Path(path)
    while True:
        file = open(path, "a+b")  # noqa: SIM115
        try:
            _lock(file)
        except BlockingIOError as error:
            file.close()
            raise Busy(f"another process is at work on {what}: wait until it ends, or choose another name.") from error
        # Whoever held it before has removed it in the meantime: then this is a lock that nobody else will see.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def read_text(path: str | os.PathLike) -> str:
    """The text of a file: UTF-8, or what its byte order mark says. Line ends become ``\\n``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is in another encoding; the message names the file, the place and what to do.
    """
    content = Path(path).read_bytes()
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')} text (byte {error.object[error.start]:#04x} at "
            f"position {error.start}): save it as UTF-8."
        ) from error
    if "\x00" in text:
        raise ValueError(f"{path} is no text: it holds zero bytes. If it is UTF-16 without a mark, save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def print_any_name() -> None:
    """Lets this process's standard output take every name: what its encoding has not got comes with backslashes.

    For scripts, at their start.
    """
    change = getattr(sys.stdout, "reconfigure", None)  # None: closed, or no console
    if change is not None:
        change(errors="backslashreplace")


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The content of a JSON file, an object by default.

    Raises:
        OSError: it cannot be read.
        ValueError: no JSON, or not of this kind; the message names the file.
    """
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {_JSON[kind]}, got {_JSON.get(type(content), 'something else')}.")
    return content


@contextmanager
def utf8_name(path: str | os.PathLike, mode: str = "rb") -> Iterator[str]:
    """A name by which libraries open a file that refuse names that are no UTF-8 (safetensors, Parquet, FAISS).

    Args:
        path: the file, of any name that Linux can have.
        mode: what they do with it.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with open(path, mode) as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield name


def read_number(text: str) -> float:
    """A number of a text file. What Python alone reads as one is none: ``1_0``, digits of other scripts.

    Raises:
        ValueError: it is no number.
    """
    if "_" in text or not text.isascii():
        raise ValueError(f"{text[:80]!r} is no number.")
    return float(text)


_JSON = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


def _named(error: OSError, path: Path) -> OSError:
    """The same error, saying which file could not be written, and not by its name until it is whole; one of another
    file stays as it is."""
    if error.filename is not None and f".{path.name}." not in os.fsdecode(error.filename):
        return error
    named = type(error)(f"{path} cannot be written: {error.strerror or error}")
    named.errno = error.errno
    return named


def _umask(folder: Path) -> int:
    """What the process's umask takes away, read without changing it for other threads."""
    probe = folder / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return UMASK & ~mode


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where the system can say so."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(file: IO[bytes]) -> bool:
    """Locks an open file; False where locks do not work. Raises BlockingIOError where another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Marks a temporary folder as one of a living process."""
    with open(folder / "lock", "wb") as file:
        with suppress(BlockingIOError):
            _lock(file)
        yield


def _abandoned(folder: Path) -> bool:
    """Whether the process that made a temporary folder has ended."""
    try:
        with open(folder / "lock", "r+b") as file:
            if _lock(file):
                return True
    except BlockingIOError:
        return False
    except OSError:  # its process was killed, or is, before it made the lock
        pass
    with suppress(OSError):
        return time.time() - folder.stat().st_mtime > ABANDONED
    return False
