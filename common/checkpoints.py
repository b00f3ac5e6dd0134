"""Files that pass between stages: written whole or not at all, plain data only, checked when read."""

import hashlib
import json
import os
import platform
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from common.cli import UserError

SCHEMA = 1


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
    """Keep `folder` to this process; UserError where another one is at work in it.

    The lock is the system's, so a killed process holds none. Folders made here that nothing was written to are removed again.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{folder}: in use by another process; wait for it or use another --output")
    try:
        yield
    finally:
        file.close()
        (folder / ".lock").unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def save(state, path):
    """Write a dict of plain data and tensors (torch format), adding schema and versions."""
    with atomic_path(path) as temporary:
        torch.save({"schema": SCHEMA, "versions": versions(), **state}, temporary)


def load(path):
    """Read what `save` wrote, tensors on the CPU. Raises UserError when it is not such a file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign and truncated files
        reason = str(error).strip().splitlines()[0][:120]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); make it again")
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"{path}: not a checkpoint of this project (schema {SCHEMA}); use one that its scripts wrote")
    if state.get("weights_sha256") != weights_sha256(state["state_dict"]):
        raise UserError(f"{path}: the weights are damaged (their sha256 differs); make it again")
    return state


def save_json(value, path):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_json(path):
    """Read a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); make it again")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(state_dict):
    """sha256 over names, shapes and bytes of a state dict: catches what a zip reader lets through."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__,
            "torchvision": str(torchvision.__version__), "numpy": np.__version__}


def require_same(expected, found, what, remedy):
    """Raise a UserError that names the first key whose value differs between two dicts."""
    for key in {**expected, **found}:
        a, b = expected.get(key), found.get(key)
        if a != b:
            raise UserError(f"{what}: {key} differs (expected {shorten(a)}, found {shorten(b)}); {remedy}")


def shorten(value):
    text = str(value)
    return text if len(text) <= 70 else text[:60] + "..."
