"""Checkpoints: a dict of plain data and tensors in torch's format, checked when read.

Only plain data is stored and `weights_only=True` reads it, so a checkpoint cannot run code.
"""

import hashlib

import torch

from common.errors import UserError, first_line
from common.files import check_seal, sealed, versions

SCHEMA = 3


def save(state, path):
    """Write plain data and tensors; adds schema and versions."""
    with sealed(path) as file:
        torch.save({"schema": SCHEMA, "versions": versions(), **state}, file)


def load(path, mmap=False):
    """Read what `save` wrote, tensors on the CPU.

    mmap: read tensors when they are used. Raises UserError when it is not such a file or when any
    byte of it is not the one written.
    """
    check_seal(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for foreign and truncated files
        raise UserError(
            f"{path}: not a readable checkpoint ({first_line(error)}); make it again"
        ) from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: not a checkpoint of this project (schema {SCHEMA}); make it with its scripts"
        )
    return state


def peek(path):
    """What a checkpoint says beside its weights; checked and refused as by `load`.

    The file is read once for its sha256, about a second per GB, and its weights are not loaded.
    """
    state = load(path, mmap=True)
    return {key: value for key, value in state.items() if key != "state_dict"}


def weights_sha256(state_dict):
    """sha256 over names, shapes and bytes of a state dict: what later stages know a model by."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
