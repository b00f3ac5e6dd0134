"""The ensemble on disk: ensemble.json says what it is, view_VVV.npy holds a view's raw logits.

Raw logits per teacher, so that temperatures, weights and the choice of teachers can change without
running a teacher again. One file per view: an interrupted build keeps what it finished, and memory
never holds more than one view.
"""

from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, require_same
from common.files import atomic_path, file_sha256, load_json, save_json
from common.losses import product_of_experts

SCHEMA = 4


def view_file(folder, view):
    """Where the logits of a view lie."""
    return Path(folder) / f"view_{view:03d}.npy"


def write_view(folder, view, logits):
    """Write one view's logits, float [teachers, pictures, classes], whole or not at all."""
    with atomic_path(view_file(folder, view)) as temporary, open(temporary, "wb") as file:
        np.save(file, logits)


def load_ensemble(folder):
    """ensemble.json of a finished build. Raises UserError where it is missing or foreign."""
    path = Path(folder) / "ensemble.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no ensemble here (no ensemble.json); make it with build_ensemble.py"
        )
    record = load_json(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: not an ensemble of this project (schema {SCHEMA}); "
            "make it with build_ensemble.py"
        )
    if "sha256" not in record:
        raise UserError(
            f"{folder}: the build was interrupted; "
            "run build_ensemble.py again, it goes on where it stopped"
        )
    return record


def begin(folder, spec, overwrite):
    """Start or continue a build: refuse a folder of another one, and keep the views of this one."""
    path = folder / "ensemble.json"
    if path.is_file():
        old, new = identity(load_json(path)), identity(spec)
        if old != new and not overwrite:
            remedy = "use --overwrite or another --output"
            require_same(new, old, f"{folder} holds another ensemble", remedy)
        if old != new:
            for file in folder.glob("view_*.npy"):
                file.unlink()
    elif any(folder.glob("view_*.npy")):
        raise UserError(
            f"{folder}: has views but no ensemble.json; remove the folder or use another --output"
        )
    save_json(spec, path)


def identity(spec):
    """What makes an ensemble what it is, wherever its pictures and teachers lie, as plain data."""
    data, pool = spec.get("data") or {}, spec.get("unlabelled") or {}
    teachers = [teacher.get("weights_sha256") for teacher in spec.get("teachers") or []]
    kept = ("schema", "pictures", "view_recipe", "seed", "dtype")
    return {
        **{name: spec.get(name) for name in kept},
        **{f"data {name}": value for name, value in data.items() if name != "dir"},
        "unlabelled": pool.get("fingerprint"),
        "teachers": teachers,
    }


class CachedLogits:
    """What the teachers said of every picture in every stored view, and the soft targets of it."""

    def __init__(self, folder, record):
        """record: of `load_ensemble`.

        Raises UserError when a view's file is missing or its bytes are not the ones written.
        """
        self.temperatures, self.weights = record["temperatures"], record["weights"]
        self.logits = []
        for view, digest in enumerate(record["sha256"]):
            file = view_file(folder, view)
            if not file.is_file() or file_sha256(file) != digest:
                raise UserError(
                    f"{file}: missing or damaged; delete it and run build_ensemble.py again"
                )
            self.logits.append(np.load(file, mmap_mode="r"))

    @property
    def views(self):
        """How many augmented views there are; view 0, the plain picture, is not counted."""
        return len(self.logits) - 1

    def of(self, views, indices):
        """Raw logits float32 [teachers, B, classes] of picture indices[b] in view views[b]."""
        columns = [self.logits[view][:, i] for view, i in zip(views, indices)]
        return np.stack(columns, axis=1).astype(np.float32, copy=False)

    def targets(self, views, indices, T):
        """Soft targets at temperature T, float32 tensor [B, classes], rows summing to 1."""
        logits = torch.from_numpy(self.of(views, indices))
        return product_of_experts(logits, self.temperatures, self.weights, T)
