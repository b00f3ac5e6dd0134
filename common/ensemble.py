"""The ensemble on disk: ensemble.json says what it is, view_VVV.npy holds raw teacher logits per view.

Raw logits per teacher, so that temperatures, weights and the choice of teachers can change without
running a teacher again. One file per view: an interrupted build keeps what it finished, and memory
never holds more than one view.
"""

from pathlib import Path

import numpy as np
import torch

from common.checkpoints import atomic_path, file_sha256, load_json
from common.cli import UserError
from common.losses import mixture

SCHEMA = 2


def view_file(folder, view):
    return Path(folder) / f"view_{view:03d}.npy"


def write_view(folder, view, logits):
    """logits: float32 array [teachers, pictures, classes] of one view, written whole or not at all."""
    with atomic_path(view_file(folder, view)) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, logits)


def load_ensemble(folder):
    """ensemble.json of a finished build. Raises UserError when it is missing, foreign or unfinished."""
    path = Path(folder) / "ensemble.json"
    if not path.is_file():
        raise UserError(f"{folder}: no ensemble here (no ensemble.json); make it with build_ensemble.py")
    record = load_json(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path}: not an ensemble of this project (schema {SCHEMA}); make it with build_ensemble.py")
    if "sha256" not in record:
        raise UserError(f"{folder}: the build was interrupted; run build_ensemble.py again, it goes on where it stopped")
    return record


def open_views(folder, record):
    """Memory maps float32 [teachers, pictures, classes], one per view, the plain view first.

    Raises UserError when a file is missing or its bytes are not the ones that were written.
    """
    views = []
    for view, digest in enumerate(record["sha256"]):
        file = view_file(folder, view)
        if not file.is_file() or file_sha256(file) != digest:
            raise UserError(f"{file}: missing or damaged; delete it and run build_ensemble.py again")
        views.append(np.load(file, mmap_mode="r"))
    return views


def soft_targets(views, record, view_numbers, indices, tau):
    """q_tau of a batch: float32 tensor [B, classes] for picture indices[b] in view view_numbers[b]."""
    logits = np.stack([views[v][:, i] for v, i in zip(view_numbers, indices)], axis=1)
    return mixture(torch.from_numpy(logits), record["temperatures"], record["weights"], tau)
