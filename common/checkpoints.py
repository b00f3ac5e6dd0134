"""Checkpoints: a dict of plain data and tensors in torch's format, checked when read.

Only plain data is stored and `weights_only=True` reads it, so a checkpoint cannot run code.
"""

import hashlib
from pathlib import Path

import torch

from common.errors import UserError, first_line
from common.files import atomic_path, versions

SCHEMA = 2


def save(state, path):
    """Write plain data and a `state_dict`; adds schema, versions and a hash of the weights."""
    stored = {
        "schema": SCHEMA,
        "versions": versions(),
        "weights_sha256": weights_sha256(state["state_dict"]),
        **state,
    }
    with atomic_path(path) as temporary:
        torch.save(stored, temporary)


def load(path):
    """Read what `save` wrote, tensors on the CPU.

    Raises UserError when it is not such a file or when its weights are not the ones written.
    """
    state = _read(path)
    if state.get("weights_sha256") != weights_sha256(state["state_dict"]):
        raise UserError(f"{path}: the weights are damaged (their sha256 differs); make it again")
    return state


def peek(path):
    """What a checkpoint says beside its weights, without reading these; errors as for `load`."""
    state = _read(path, mmap=True)
    return {key: value for key, value in state.items() if key != "state_dict"}


def _read(path, mmap=False):
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
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


def weights_sha256(state_dict):
    """sha256 over names, shapes and bytes of a state dict: a flipped bit loads without a word."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
