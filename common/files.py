"""Files that pass between stages: written whole or not at all, and checked when read.

Needs the standard library alone. What holds tensors is in checkpoints.py.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError

PACKAGES = ("torch", "torchvision", "timm", "numpy")


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and move it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder):
    """Keep `folder` to this process. Raises UserError where another one is at work in it.

    The lock is the system's, so a killed process holds none. Folders that were made here and that
    nothing was written to are removed again.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        lock(file)
    except OSError:
        file.close()
        raise UserError(
            f"{folder}: in use by another process; wait for it or use another --output"
        ) from None
    try:
        yield
    finally:
        file.close()
        (folder / ".lock").unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def lock(file):
    """Take the system's lock on an open file at once. Raises OSError where it is taken."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def save_json(value, path):
    """Write plain data as JSON, whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_json(path):
    """Read a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); make it again") from None


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
