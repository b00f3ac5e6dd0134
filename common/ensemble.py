"""The ensemble on disk: ensemble.json says what it is, view_VVV.npy holds a view's raw logits.

Raw logits per teacher, so that temperatures, weights and the choice of teachers can change without
running a teacher again. One file per view: an interrupted build keeps what it finished, and memory
never holds more than one view.
"""

from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, require_same
from common.files import check_seal, file_sha256, load_json, save_json, sealed
from common.losses import product_of_experts

SCHEMA = 5


def view_file(folder, view):
    """Where the logits of a view lie."""
    return Path(folder) / f"view_{view:03d}.npy"


def write_view(folder, view, logits):
    """Write one view's logits, float [teachers, pictures, classes]; returns the file's sha256."""
    with sealed(view_file(folder, view)) as file:
        np.save(file, logits)
    return file.digest.hexdigest()


def intact_views(folder, views, known):
    """{view: sha256 of its file} of those stored already; says which are damaged and leaves them.

    views: how many there are to be; known: {view: sha256} of the finished build, {} without one.
    """
    found = {}
    for view in range(views):
        file = view_file(folder, view)
        if not file.is_file():
            continue
        try:
            digest = check_seal(file)
        except UserError as error:
            print(f"{error}: computed again")
            continue
        if known.get(view, digest) == digest:
            found[view] = digest
        else:
            print(f"{file}: not the one of this ensemble; computed again")
    return found


def load_ensemble(folder):
    """ensemble.json of a finished build. Raises UserError where it is missing or foreign."""
    path = Path(folder) / "ensemble.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no ensemble here (no ensemble.json); make it with build_ensemble.py"
        )
    record = load_json(path)
    if record.get("schema") != SCHEMA:
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
    """Start or continue a build: refuse a folder of another one, and keep the views of this one.

    Returns {view: sha256} where an earlier build has finished, else {}.
    """
    path, known = folder / "ensemble.json", {}
    if path.is_file():
        try:
            record = load_json(path)
        except UserError as error:
            if not overwrite:
                raise UserError(f"{error} with --overwrite") from None
            record = {}
        old, new = identity(record), identity(spec)
        if old == new:
            known = dict(enumerate(record.get("sha256", [])))
        elif not overwrite:
            remedy = "use --overwrite or another --output"
            require_same(new, old, f"{folder} holds another ensemble", remedy)
        else:
            for file in folder.glob("view_*.npy"):
                file.unlink()
    elif any(folder.glob("view_*.npy")):
        raise UserError(
            f"{folder}: has views but no ensemble.json; remove the folder or use another --output"
        )
    save_json(spec, path)
    return known


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
                    f"{file}: missing or damaged; run build_ensemble.py again, it computes it anew"
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
