"""The ensemble on disk: ensemble.json says what it is, view_VVV.npy holds a view's raw logits.

Raw logits per teacher, so that temperatures, weights and the choice of teachers can change without
running a teacher again. One file per view: an interrupted build keeps what it finished, and memory
never holds more than one view.
"""

from pathlib import Path

import numpy as np
import torch

from common import files
from common.files import UserError
from common.losses import product_of_experts

SCHEMA = 8


def view_file(folder, view):
    """Where the logits of a view lie."""
    return Path(folder) / f"view_{view:03d}.npy"


def write_view(folder, view, logits):
    """Write one view's logits, float [teachers, pictures, classes]."""
    with files.checksummed(view_file(folder, view)) as file:
        np.save(file, logits)


def missing_views(folder, views):
    """The numbers from 1 to `views` of those not stored yet, or damaged, which a line says."""
    missing = []
    for view in range(1, 1 + views):
        file = view_file(folder, view)
        try:
            files.check_checksum(file)
        except UserError as error:
            missing.append(view)
            if file.is_file():
                print(f"{error}: computed again")
    return missing


def start_build(folder, spec, overwrite):
    """Start or continue a build: refuse a folder of another one, and keep the views of this one.

    spec: what ensemble.json is to say, but for what is fitted on validation.
    """
    path = folder / "ensemble.json"
    if path.is_file():
        try:
            stored = files.load_json(path)
        except UserError as error:
            if not overwrite:
                raise UserError(f"{error} with --overwrite") from None
            stored = {}
        both = identity(spec), identity(stored)
        if not overwrite:
            remedy = "use --overwrite or another --output"
            files.require_same(*both, f"{folder} holds another ensemble", remedy)
        if both[0] != both[1]:
            for file in folder.glob("view_*.npy"):
                file.unlink()
    elif any(folder.glob("view_*.npy")):
        raise UserError(
            f"{folder}: has views but no ensemble.json; remove the folder or use another --output"
        )
    files.save_json(spec, path)


def views_before(folder, spec):
    """How many views an earlier start of this very ensemble was to store; None where none was."""
    try:
        stored = files.load_json(folder / "ensemble.json")
    except UserError:
        return None
    views = stored.get("views") or stored.get("views_asked")
    return views if identity(spec) == identity(stored) else None


def identity(spec):
    """What makes an ensemble what it is, wherever its pictures and teachers lie, as plain data."""
    dataset, pool = spec.get("dataset") or {}, spec.get("unlabelled") or {}
    kept = ("schema", "pictures", "view_recipe", "seed", "dtype")
    return {
        **{name: spec.get(name) for name in kept},
        **{f"dataset {name}": value for name, value in dataset.items() if name != "dir"},
        "unlabelled": pool.get("fingerprint"),
        "unlabelled dropped": pool.get("dropped"),
        "teachers": [f"{teacher['model']} {teacher['weights_sha256']}"
                     for teacher in spec.get("teachers") or []],
    }


def load_ensemble(folder):
    """ensemble.json of a finished build. Raises UserError where it is missing or foreign."""
    path = Path(folder) / "ensemble.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no ensemble here (no ensemble.json); make it with build_ensemble.py"
        )
    spec = files.load_json(path)
    if spec.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: not an ensemble of this project (schema {SCHEMA}); "
            "make it with build_ensemble.py"
        )
    if "views" not in spec:
        raise UserError(
            f"{folder}: the build was interrupted; "
            "run build_ensemble.py again, it goes on where it stopped"
        )
    return spec


class CachedLogits:
    """What the teachers said of every picture in every stored view, and the soft targets of it."""

    def __init__(self, folder, spec):
        """spec: of `load_ensemble`.

        Raises UserError when a view's file is missing or its bytes are not the ones written.
        """
        self.temperatures, self.weights = spec["temperatures"], spec["weights"]
        self.views, self.logits = spec["views"], {}
        for view in range(1, 1 + self.views):
            file = view_file(folder, view)
            try:
                files.check_checksum(file)
            except UserError as error:
                raise UserError(
                    f"{error}: build_ensemble.py, called again, computes it anew"
                ) from None
            self.logits[view] = np.load(file, mmap_mode="r")

    def of(self, views, indices):
        """Raw logits float32 [teachers, B, classes] of picture indices[b] in view views[b] >= 1."""
        columns = [self.logits[view][:, i] for view, i in zip(views, indices)]
        return np.stack(columns, axis=1).astype(np.float32, copy=False)

    def targets(self, views, indices, T):
        """Soft targets at temperature T, float32 tensor [B, classes], rows summing to 1."""
        logits = torch.from_numpy(self.of(views, indices))
        return product_of_experts(logits, self.temperatures, self.weights, T)
