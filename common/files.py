"""Files that pass between stages: written whole or not at all, and checked when read.

Needs the standard library alone. What holds tensors is in checkpoints.py.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError

PACKAGES = ("torch", "torchvision", "timm", "numpy")
EXPORTED = ("student.ts", "student.int8.ts", "student.onnx", "student.int8.onnx")
# What a sealed file ends with. It is the end of a JSON object, so that JSON stays JSON; numpy,
# torch and zip files are read as before, since their readers do not look behind their data.
SEAL = ',\n "sha256_of_all_above": "{}"\n}}\n'
# The same as an entry of metadata in the format of ONNX, which is its file's last.
ONNX_SEAL = "r\x57\n\x13sha256_of_all_above\x12@{}"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota, largest size of a file


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and move it into place.

    An OSError that does not name its file, as of a full disk, gets the name of this one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_together(folder):
    """Yield an empty folder; on success move its files into `folder`, all of one run or none.

    What stood there under their names is removed first, so that a kill between two moves leaves
    files missing, never files of two runs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".new.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for name in names:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_stale(folder):
    """Remove the temporary files in `folder` that a killed process has left there."""
    for path in Path(folder).glob(".*.tmp"):
        number = re.search(r"\.(\d+)\.tmp$", path.name)
        if number and not is_running(int(number.group(1))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_running(pid):
    """Whether there is a process of this number; always True on Windows, where asking kills it."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


# ---------------------------------------------------------------------------------- sealed files


class HashedFile:
    """A binary file that is hashed while it is written, from front to back."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        """Write and hash bytes. Keeps the OSError, which torch would hide behind one of its own."""
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        """Hand all to the system, so that others can read it under `name`."""
        self.file.flush()

    @property
    def name(self):
        """Where the file lies until it is whole."""
        return self.file.name

    def reserve(self, size):
        """Claim `size` bytes of disk, so that a full one is noticed before the work."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self.file.fileno(), 0, size)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise  # any other: this file system cannot say


@contextmanager
def sealed(path, seal=SEAL):
    """Yield a `HashedFile` to write `path` with, whole or not at all; it ends with its sha256."""
    with atomic_path(path) as temporary, open(temporary, "wb") as raw:
        file = HashedFile(raw)
        try:
            yield file
            file.write(seal.format(file.digest.hexdigest()).encode())
            raw.truncate()  # what was reserved and not needed
        except Exception:
            if file.error:
                raise file.error from None
            raise


def check_seal(path, seal=SEAL):
    """Raise a UserError unless every byte of a sealed file is the one written.

    Returns the sha256 of the whole file, as `file_sha256` does; costs about a second per GB.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - len(seal.format("0" * 64))
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        found = file.read()
    if found == seal.format(digest.hexdigest()).encode():
        digest.update(found)
        return digest.hexdigest()
    head = seal.split("{}")[0].encode()
    if found.startswith(head):
        raise UserError(f"{path}: damaged (its sha256 differs); make it again")
    raise UserError(
        f"{path}: cut off, or not of this version of the project (no sha256 at its end); "
        "make it again"
    )


# -------------------------------------------------------------------------------- folders in use


@contextmanager
def exclusive(folder):
    """Keep `folder` to this process. Raises UserError where another one is at work in it.

    The lock is the system's, so a killed process holds none; its temporary files are removed.
    Folders that were made here and that nothing was written to are removed again.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = open_locked(folder)
    clear_stale(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            (folder / ".lock").unlink()  # before it is let go, see `open_locked`
        file.close()
        for each in made:
            with suppress(OSError):  # not empty
                each.rmdir()


def open_locked(folder):
    """The locked file folder/.lock; makes the folder. Raises UserError where another holds it."""
    path = folder / ".lock"
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder}: is a file, not a folder; use another --output") from None
        except FileNotFoundError:  # its last holder is removing the folder
            continue
        try:
            lock(file)
        except OSError:
            file.close()
            break
        # The last holder may have removed the file between our open and lock: it guards nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()
    raise UserError(f"{folder}: in use by another process; wait for it or use another --output")


def lock(file):
    """Take the system's lock on an open file at once. Raises OSError where it is taken."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def save_json(value, path):
    """Write a dict of plain data as JSON, whole or not at all, with a seal as its last entry."""
    text = json.dumps(value, indent=1)
    with sealed(path) as file:
        file.write(text.removesuffix("\n}").encode())


def load_json(path):
    """Read what `save_json` wrote. Raises UserError when it is missing, damaged or foreign."""
    check_seal(path)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # another kind of sealed file
        raise UserError(f"{path}: not readable as JSON ({error}); make it again") from None
    del value["sha256_of_all_above"]
    return value


def file_sha256(path):
    """sha256 of a file's bytes, as a hexadecimal string; about a second per GB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions():
    """{"python": "3.11.7", "torch": ...} of what made an artefact; None for what is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
