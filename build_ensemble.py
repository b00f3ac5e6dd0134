"""Stage 2: combine teachers and store what they say about every training view on disk.

    python build_ensemble.py                                            # every teacher under runs/
    python build_ensemble.py runs/a/best.pt runs/b/best.pt --views 8 --unlabelled my_parts/unlabelled
    python build_ensemble.py --check 200                                # recompute 200 stored answers

Reads   teachers' best.pt, and the pictures they were trained on
Writes  runs/ensemble/ensemble.json   teachers, classes, data, views, temperatures, mixture weights
        runs/ensemble/view_VVV.npy    raw logits, float32 [teachers, pictures, classes]; view 0 is the plain picture
Next    distill.py

An interrupted build goes on where it stopped. Costs one forward pass per teacher, picture and view.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import audit, cli, data, models
from common.checkpoints import exclusive, file_sha256, load, load_json, require_same, save_json, versions
from common.ensemble import SCHEMA, load_ensemble, open_views, view_file, write_view
from common.losses import fit_temperature, fit_weights, mixture
from common.metrics import score
from common.views import recipe_from_record, render_blended

PICTURE_VIEWS = 10_000  # stored by default: about what 400 steps of 24 see once
MIXUP = 0.7  # where no unlabelled pictures take part
TOLERANCE = 1e-2  # of a logit, for --check: another batch size or device rounds otherwise


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("checkpoint", nargs="*", help="teachers' best.pt (default: every teacher in runs/*/best.pt)")
    p.add_argument("--views", type=cli.positive_int, help="augmented views to store, beside the plain one "
                   f"(default: as many as make {PICTURE_VIEWS} picture-views, at least 4: a student learns few views by heart)")
    p.add_argument("--unlabelled", metavar="DIR", help="pictures without labels that take part in distillation "
                   "(default: unlabelled/ in the data folder where there is one; 'none' for none)")
    p.add_argument("--weights", choices=["fitted", "equal"], default="fitted", help="of the teachers in the mixture")
    p.add_argument("--view-recipe", nargs="+", default=[], metavar="NAME=NUMBER",
                   help="change the views from those the teachers were trained on, as in zoom_min=0.6 (see common/views.py)")
    p.add_argument("--mixup", type=cli.fraction, help="share of the views that are blended with another picture's view, so that the teachers are asked "
                   f"more than few pictures ask (default: {MIXUP}, or 0 where unlabelled pictures take part)")
    p.add_argument("--check", type=cli.positive_int, metavar="N",
                   help="instead of building, recompute N stored picture-views and compare")
    p.add_argument("--data-dir", help="the pictures' folder (default: where the teachers found them)")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=64, help="pictures per forward pass")
    p.add_argument("--seed", type=cli.natural, default=0, help="of the views")
    p.add_argument("--output", default="runs/ensemble", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace an ensemble of other teachers or settings")
    cli.add_data_flags(p)
    cli.add_device_flag(p)
    return p.parse_args()


def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    if args.check:
        check(args, watch)
    else:
        with exclusive(args.output):
            build(args, watch)
    print(watch)


def build(args, watch):
    paths = args.checkpoint or find_teachers()
    with watch("pictures"):
        teachers, records, train, val, data_record = open_teachers(paths, args)
        labelled = train
        train, pool = add_unlabelled(train, data_record, args)
    mixup = args.mixup if args.mixup is not None else 0.0 if pool else MIXUP
    with watch("audit"):
        audit.look(labelled, val, data_record, args)
    for path, record in zip(paths, records):
        print(f"teacher {path}: {record['model']} at {record['img_size']} px")
    recipe_record = recipe_from_record(records[0]["view_recipe"]).changed(args.view_recipe).record()
    spec = {"schema": SCHEMA, "teachers": [{"path": str(path), "sha256": file_sha256(path), "model": record["model"],
                                            "img_size": record["img_size"]} for path, record in zip(paths, records)],
            "data": data_record, "unlabelled": pool, "pictures": len(train), "view_recipe": recipe_record,
            "mixup": mixup, "seed": args.seed, "dtype": "float32"}
    folder = Path(args.output)
    begin(folder, spec, args.overwrite)

    with watch("validation"):
        val_logits = torch.stack([models.predict(teacher, val, args.device) for teacher in teachers])
    combination = combine(val_logits, val.labels, args.weights, paths)
    with watch("audit"):
        suspicions = {"val": audit.doubts(val, [torch.softmax(z / t, 1).numpy() for z, t in zip(val_logits, combination["temperatures"])]),
                      "train": audit.doubts(labelled, [audit.neighbour_votes(models.features(teacher, labelled, args.device), labelled.labels,
                                                                             len(data_record["classes"])).numpy() for teacher in teachers])}
    print_doubts(suspicions, data_record["classes"])

    views = 1 + (args.views or max(4, PICTURE_VIEWS // len(train)))
    missing = [view for view in range(views) if not view_file(folder, view).is_file()]
    print(f"{len(train)} pictures, {views} views ({100 * mixup:.0f} % of them blended) of which {len(missing)} are to be computed")
    with tqdm(total=len(missing) * len(train), desc="caching logits", disable=None, leave=False) as bar:
        for view in missing:
            logits = np.empty((len(teachers), len(train), len(data_record["classes"])), np.float32)
            for start in range(0, len(train), args.batch_size):
                indices = np.arange(start, min(start + args.batch_size, len(train)))
                with watch("views"):
                    pixels, _ = render_blended(train, indices, np.full(len(indices), view), args.seed,
                                               recipe_from_record(recipe_record), mixup, args.device)
                with watch("teachers"):
                    logits[:, indices] = teacher_logits(teachers, pixels, args.device)
                bar.update(len(indices))
            write_view(folder, view, logits)
            tqdm.write(f"view {view} of {views - 1} stored")
    shape = [len(teachers), len(train), len(data_record["classes"])]
    save_json({**spec, **combination, "suspicions": suspicions, "shape": shape, "versions": versions(),
               "sha256": [file_sha256(view_file(folder, view)) for view in range(views)]}, folder / "ensemble.json")
    print(f"{folder}: {views} views of {shape[1]} pictures by {shape[0]} teachers")


def find_teachers():
    paths = [path for path in sorted(Path("runs").glob("*/best.pt")) if load(path)["kind"] == "teacher"]
    if not paths:
        raise cli.UserError("no teacher in runs/*/best.pt; run train_teacher.py or name checkpoints")
    return paths


def open_teachers(paths, args):
    """Load teachers and the pictures they were trained on; refuse teachers of other classes or data."""
    args.device = cli.pick_device(args.device)
    teachers, records = zip(*(models.load_model(path, args.device) for path in paths))
    for path, record in zip(paths, records):
        if record["kind"] != "teacher":
            raise cli.UserError(f"{path}: a {record['kind']}, not a teacher; name checkpoints of train_teacher.py")
        require_same({**records[0]["data"], "dir": None}, {**record["data"], "dir": None},
                     f"{path} against {paths[0]}", "an ensemble needs teachers trained on the same pictures and split")
    where = {**records[0]["data"], **({"dir": args.data_dir} if args.data_dir else {})}
    train, val, data_record = data.open_training_data(where, args)
    return teachers, records, train, val, data_record


def add_unlabelled(train, data_record, args):
    """(train with the pool behind it, the pool's record or None)."""
    folder = Path(args.unlabelled or Path(data_record["dir"]) / "unlabelled")
    if args.unlabelled == "none" or (args.unlabelled is None and not folder.is_dir()):
        return train, None
    pack = data.open_pack(folder, data_record["view_size"], args, labelled=False)
    return data.with_pool(train, pack), {"dir": folder.as_posix(), "fingerprint": pack.fingerprint}


def begin(folder, spec, overwrite):
    """Start or continue a build: refuse a folder of another one, and keep the views of this one."""
    path = folder / "ensemble.json"
    if path.is_file():
        old = load_json(path)
        if overwrite and any(old.get(name) != value for name, value in spec.items()):
            for file in folder.glob("view_*.npy"):
                file.unlink()
        else:
            require_same(spec, {name: old.get(name) for name in spec}, f"{folder} holds another ensemble",
                         "use --overwrite or another --output")
    elif any(folder.glob("view_*.npy")):
        raise cli.UserError(f"{folder}: has views but no ensemble.json; remove the folder or use another --output")
    save_json(spec, path)


def combine(val_logits, labels, weighting, paths):
    """Fit temperatures and mixture weights on validation, and print what they give.

    val_logits: float32 [teachers, N, classes]; labels: int64 [N]. Returns plain data for ensemble.json.
    """
    temperatures = [fit_temperature(logits, labels) for logits in val_logits]
    calibrated = torch.stack([torch.softmax(z / t, dim=1) for z, t in zip(val_logits, temperatures)])
    weights = fit_weights(calibrated, labels) if weighting == "fitted" else [1 / len(paths)] * len(paths)
    print(f"on {len(labels)} validation pictures:{'':16} weight  temperature  accuracy  balanced    NLL")
    rows = [(str(path), w, t, score(p, labels)) for path, w, t, p in zip(paths, weights, temperatures, calibrated)]
    rows.append(("the mixture", 1.0, 1.0, score(mixture(val_logits, temperatures, weights), labels)))
    for name, weight, temperature, metrics in rows:
        print(f"  {name:40} {weight:7.3f}  {temperature:11.2f}  {metrics['accuracy']:8.3f}  "
              f"{metrics['balanced_accuracy']:8.3f}  {metrics['nll']:5.3f}")
    keys = ("accuracy", "balanced_accuracy", "nll", "n")
    return {"temperatures": temperatures, "weights": weights, "weighting": weighting,
            "validation": {name: {key: metrics[key] for key in keys} for name, _, _, metrics in rows}}


def print_doubts(suspicions, classes):
    for name, found in suspicions.items():
        if found:
            some = [f"{s['picture']} (all say {classes[s['suggested']]}, {100 * s['probability']:.0f} %)" for s in found[:audit.SHOWN]]
            print(f"audit: {len(found)} labels of {name} to look at again: {', '.join(some)}" + (", ..." if len(found) > audit.SHOWN else ""))


@torch.inference_mode()
def teacher_logits(teachers, pixels, device):
    """float32 array [teachers, B, classes] for pixels float32 [B, 3, S, S]: one rendering, all teachers."""
    with models.autocast(device):
        return torch.stack([teacher(pixels).float() for teacher in teachers]).cpu().numpy()


def check(args, watch):
    """Recompute N stored picture-views, drawn at random, and fail where they differ."""
    record = load_ensemble(args.output)
    views = open_views(args.output, record)
    args.unlabelled = record["unlabelled"]["dir"] if record["unlabelled"] else "none"
    with watch("pictures"):
        teachers, _, train, _, _ = open_teachers([teacher["path"] for teacher in record["teachers"]], args)
        train, pool = add_unlabelled(train, record["data"], args)
    require_same({"unlabelled": record["unlabelled"]}, {"unlabelled": pool}, args.output, "the unlabelled pictures changed; build again")
    rng = np.random.default_rng(args.seed)
    picks = rng.integers(0, [len(views), len(train)], (args.check, 2))
    worst = 0.0
    with watch("teachers"):
        for start in range(0, len(picks), args.batch_size):
            view_numbers, indices = picks[start:start + args.batch_size].T
            pixels, _ = render_blended(train, indices, view_numbers, record["seed"],
                                       recipe_from_record(record["view_recipe"]), record["mixup"], args.device)
            stored = np.stack([views[v][:, i] for v, i in zip(view_numbers, indices)], axis=1)
            worst = max(worst, float(np.abs(stored - teacher_logits(teachers, pixels, args.device)).max()))
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{args.output}: stored logits differ from the teachers' by {worst:.2g} (tolerance {TOLERANCE:g}); build again")
    print(f"{args.output}: {args.check} stored picture-views recomputed, largest difference of a logit {worst:.1e}")


if __name__ == "__main__":
    cli.run(main)
