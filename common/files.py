"""Files that pass between stages: written whole or not at all, checked when read; and refusals.

Needs the standard library alone, and filelock where a folder is held. What holds tensors is in
models.py.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import tempfile
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows, whose file systems have locks
    fcntl = None

PACKAGES = ("torch", "torchvision", "timm", "numpy")
EXPORTED = ("student.ts", "student.int8.ts", "student.onnx", "student.int8.onnx")
# What a checked file ends with: the end of a JSON object, so that JSON stays JSON. Readers of
# numpy's and torch's files do not look behind their data.
CHECKSUM = ',\n "sha256_of_all_above": "{}"\n}}\n'
SHOWN = 3  # examples in a line
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


# -------------------------------------------------------------------------------------- refusals


class UserError(Exception):
    """Wrong usage or input, no bug of ours: one line that says what, where and how to mend it.

    Scripts print it and end with status 2.
    """


def require_same(expected, actual, what, remedy):
    """Raise a UserError that names the first key whose value differs between two dicts.

    Of two lists of names it says which are missing and which too many.
    """
    for key in {**expected, **actual}:
        a, b = expected.get(key), actual.get(key)
        if a != b:
            raise UserError(f"{what}: {key} differs ({difference(a, b)}); {remedy}")


def difference(expected, found):
    """How a value differs from the expected one, in words."""
    lists = isinstance(expected, list) and isinstance(found, list)
    if not (lists and all(isinstance(name, str) for name in expected + found)):
        return f"expected {shorten(expected)}, found {shorten(found)}"
    sides = {"missing": set(expected) - set(found), "too many": set(found) - set(expected)}
    alike = {unicodedata.normalize("NFKC", name) for name in sides["missing"]}
    show = ascii if alike & {unicodedata.normalize("NFKC", n) for n in sides["too many"]} else str
    words = [f"{side}: {some_of(list(map(show, sorted(names))))}"
             for side, names in sides.items() if names]
    return "; ".join(words) or "another order"


def shorten(value):
    """A value as text of at most 70 characters."""
    text = str(value)
    return text if len(text) <= 70 else text[:60] + "..."


def first_line(error, limit=120):
    """The first line of an exception's message, or its type where it has none, cut to `limit`."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    return first if len(first) <= limit else f"{first[:limit - 3]}..."


def some_of(texts):
    """The first of some texts, and how many more there are."""
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def px(size):
    """A size [height, width] as flags take it: '128 px' of a square, else '96x240 px'."""
    height, width = size
    return f"{height} px" if height == width else f"{height}x{width} px"


# ---------------------------------------------------------------------------- whole or not at all


@contextmanager
def named(path):
    """Give an OSError that does not name its file, as of a full or failing disk, this path."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and move it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number alone, which processes of two containers or hosts may share.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with named(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_together(folder, names):
    """Yield an empty folder; on success its files take the place of `names` in `folder`.

    These go first, so that a kill between two moves leaves files missing, never those of two runs.
    """
    folder = Path(folder)
    temporary = folder / ".new.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive(folder, wait=False):
    """Keep `folder` to this process. Where another one is at work in it: wait, or a UserError.

    The lock is the system's, so a killed process holds none; what it left half-written is removed,
    and so are folders that were made here and that nothing was written to. Where a file system has
    no locks, as some of networks, a line says so and the user has to see to it.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock, locked = FileLock(folder / ".lock"), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if locked := has_locks(folder):
            lock.acquire(timeout=-1 if wait else 0)
        else:
            print(f"warning: {folder}: no file locks there; let no two scripts write into it")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: is a file, not a folder; use another --output") from None
    except (Timeout, FileNotFoundError):  # the latter: its holder is just removing the folder
        raise UserError(
            f"{folder}: in use by another process; wait for it or use another --output"
        ) from None
    try:
        for path in folder.glob(".*.tmp") if locked else ():  # else it may be another's, alive
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        if locked:
            with suppress(OSError):  # Windows removes no open file
                (folder / ".lock").unlink()  # while held, so that nobody waits for a removed one
            lock.release()
        for each in made:
            with suppress(OSError):  # not empty
                each.rmdir()


def has_locks(folder):
    """Whether files of a folder can be locked; where not, an attempt would wait for ever."""
    if fcntl is None:
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # which a kill leaves nothing of
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


# ------------------------------------------------------------------------------------- checksums


class HashedFile:
    """A binary file that is hashed while it is written; it keeps an OSError, which torch hides."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None
        self.name, self.flush = file.name, file.flush

    def write(self, content):
        """Write and hash bytes."""
        self.digest.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def checksummed(path, ending=CHECKSUM):
    """Yield a `HashedFile` to write `path` with, whole or not at all; it ends with its sha256."""
    with atomic_path(path) as temporary, open(temporary, "wb") as raw:
        file = HashedFile(raw)
        try:
            yield file
            file.write(ending.format(file.digest.hexdigest()).encode())
        except Exception as error:
            raise file.error or error  # noqa: B904


def check_checksum(path):
    """Raise a UserError unless every byte of a `checksummed` file is the one written.

    Costs about a second per GB.
    """
    if not Path(path).is_file():
        what = "a folder; name a file in it" if Path(path).is_dir() else "no such file"
        raise UserError(f"{path}: {what}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - len(CHECKSUM.format("0" * 64))
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        end = file.read()
    if end == CHECKSUM.format(digest.hexdigest()).encode():
        return
    reason = "cut off, or not of this version of the project (no sha256 at its end)"
    if end.startswith(CHECKSUM.split("{}")[0].encode()):
        reason = "damaged (its sha256 differs)"
    raise UserError(f"{path}: {reason}; make it again")


def save_json(content, path):
    """Write a dict of plain data as JSON, whole or not at all, its checksum as the last entry."""
    text = json.dumps(content, indent=1)
    with checksummed(path) as file:
        file.write(text.removesuffix("\n}").encode())


def load_json(path):
    """Read what `save_json` wrote. Raises UserError when it is missing, damaged or foreign."""
    check_checksum(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # another kind of file with a checksum
        raise UserError(f"{path}: not readable as JSON ({error}); make it again") from None
    del content["sha256_of_all_above"]
    return content


def remembered(home, name, identity, make):
    """What make() returns, plain data, which is kept in a file of the folder `home`.

    It is called only where the file is missing, damaged or of another identity. identity: all that
    decides the result, as plain data, the version of the code that makes it among it.
    """
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    path = f"{home}/{name}-{key}.json"
    with suppress(UserError):
        return load_json(path)
    content = make()
    save_json(content, path)
    return content


def file_sha256(path):
    """sha256 of a file's bytes, as a hexadecimal string; about a second per GB."""
    digest = hashlib.sha256()
    with named(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions():
    """{"python": "3.11.7", "torch": ...} of what makes an artefact; None for what is missing."""
    by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = None
    return by_name
