"""Stage 2: combine teachers and store what they say about every training view on disk.

    python build_ensemble.py                                 # every teacher under runs/
    python build_ensemble.py runs/a/best.pt runs/b/best.pt --views 8 --unlabelled my_parts/pool
    python build_ensemble.py --check 200                     # recompute 200 stored answers

Reads   teachers' best.pt, and the pictures they were trained on
Writes  runs/ensemble/ensemble.json   teachers, classes, data, views, temperatures, weights
        runs/ensemble/view_VVV.npy    raw logits [teachers, pictures, classes]; view 0 is the plain
                                      picture
Next    distill.py

An interrupted build goes on where it stopped. Costs one forward pass per teacher, picture and view.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import cli, distributed, folders, labels, models, splits
from common.checkpoints import peek
from common.combination import combine
from common.ensemble import SCHEMA, CachedLogits, begin, intact_views, load_ensemble, write_view
from common.errors import UserError, require_same
from common.files import save_json, versions
from common.views import ViewRecipe, render

# Stored by default: about what 400 steps of 24 see once. Labelled pictures alone are few, and a
# student that sees the same views of them again learns them by heart.
PICTURE_VIEWS, LABELLED_VIEWS = 10_000, 20_000
TOLERANCE = 1e-2  # of a logit, for --check: another batch size or device rounds otherwise


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("checkpoint", nargs="*",
                   help="teachers' best.pt (default: every teacher in runs/*/best.pt)")
    p.add_argument("--views", type=cli.positive_int,
                   help="augmented views to store, beside the plain one (default: as many as make "
                   f"{PICTURE_VIEWS} picture-views, {LABELLED_VIEWS} without a pool, at least 4)")
    p.add_argument("--unlabelled", metavar="DIR",
                   help="pictures without labels that take part in distillation (default: "
                   "unlabelled/ in the data folder where there is one; 'none' for none)")
    p.add_argument("--teacher-weights", choices=["fitted", "equal"], default="fitted",
                   help="weights of the teachers: fitted on validation pictures, or equal")
    p.add_argument("--dtype", choices=["float32", "float16"], default="float32",
                   help="of the stored logits; float16 takes half the space and changes soft "
                   "targets by less than 0.001")
    p.add_argument("--check", type=cli.positive_int, metavar="N",
                   help="instead of building, recompute N stored picture-views and compare")
    p.add_argument("--seed", type=cli.natural, default=0, help="of the views")
    p.add_argument("--output", default="runs/ensemble", help="folder to write")
    p.add_argument("--overwrite", action="store_true",
                   help="replace an ensemble of other teachers or settings")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=64,
                   help="pictures per forward pass")
    cli.add_device_flag(p)

    g = p.add_argument_group("pictures and views")
    g.add_argument("--data-dir",
                   help="the pictures' folder (default: where the teachers found them)")
    g.add_argument("--view-recipe", nargs="+", default=[], metavar="NAME=NUMBER",
                   help="change the views from those the teachers saw, as in zoom_min=0.6")
    cli.add_reading_flags(p)
    return p.parse_args()


@distributed.processes()
def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    if args.check:
        check(args, watch)
    else:
        with distributed.hold(args.output):
            build(args, watch)
    print(watch)


def build(args, watch):
    """Fit the weights on validation, then store what the teachers say of every view."""
    paths = args.checkpoint or find_teachers()
    device = cli.pick_device(args.device)
    teachers, records = load_teachers(paths, device)
    with distributed.first_then_others():
        train, val, data = open_pictures(records[0]["data"], args)
        pool_dir = folders.pool_folder(data["dir"], args.unlabelled)
        pool = splits.open_unlabelled(cli.decoded_cache(args), pool_dir, data) if pool_dir else None
    pictures = train + pool if pool else train
    watch.lap("pictures")

    # What this ensemble is; a folder with views of another one is refused.
    theirs = cli.stored_recipe(ViewRecipe, records[0], paths[0])
    recipe = cli.changed_recipe(theirs, args.view_recipe)
    folder = Path(args.output)
    spec = {
        "schema": SCHEMA,
        "teachers": describe_teachers(paths, records),
        "data": data,
        "unlabelled": None,
        "pictures": len(pictures),
        "view_recipe": recipe.record(),
        "seed": args.seed,
        "dtype": args.dtype,
    }
    if pool:
        spec["unlabelled"] = {"dir": pool_dir.as_posix(), "fingerprint": pool.fingerprint()}

    # Temperatures, weights and doubtful labels.
    known = {}
    if distributed.rank() == 0:
        known = begin(folder, spec, args.overwrite)
        val_logits = torch.stack([models.predict(teacher, val, device) for teacher in teachers])
        require_finite(val_logits.numpy(), paths)
        combination = combine(val_logits, val.labels, args.teacher_weights, paths)
        watch.lap("validation")
        doubtful = doubt(teachers, train, val, val_logits, combination["temperatures"])
        for line in labels.describe(doubtful, data["classes"]):
            print(line)
        watch.lap("doubtful labels")

    # The views that an earlier start has not stored.
    wanted = PICTURE_VIEWS if pool else LABELLED_VIEWS
    views = 1 + (args.views or max(4, wanted // len(pictures)))
    stored = intact_views(folder, views, known) if distributed.rank() == 0 else {}
    absent = torch.tensor([view not in stored for view in range(views)])
    missing = distributed.from_first(absent).nonzero().flatten().tolist()
    print(f"{len(pictures)} pictures, {views} views, {len(missing)} of them to be computed")
    stored |= store_views(missing, teachers, pictures, recipe, spec, args)
    watch.lap("teachers")
    if distributed.rank():
        return

    digests = [stored[view] for view in range(views)]
    rest = {"doubtful": doubtful, "versions": versions(), "sha256": digests}
    save_json({**spec, **combination, **rest}, folder / "ensemble.json")
    print(f"{folder}: {views} views of {len(pictures)} pictures by {len(teachers)} teachers")


def store_views(missing, teachers, pictures, recipe, spec, args):
    """Compute and write the views that are missing; returns {view: sha256 of its file}.

    Whole batches are shared out among processes, so that several round as one does.
    """
    device = next(teachers[0].parameters()).device
    paths = [teacher["path"] for teacher in spec["teachers"]]
    batches = distributed.share(in_batches(np.arange(len(pictures)), args.batch_size))
    shape = (len(teachers), len(pictures), len(spec["data"]["classes"]))
    total = len(missing) * sum(map(len, batches))
    hidden = distributed.rank() > 0 or None  # None: only where there is no terminal
    stored = {}
    with tqdm(total=total, desc="logits", disable=hidden, leave=False) as bar:
        for view in missing:
            logits = np.zeros(shape, np.float32)
            plan = [(indices, np.full(len(indices), view)) for indices in batches]
            for indices, same, batch in pictures.ahead(plan, device):
                pixels = render(batch, indices, same, args.seed, recipe)
                logits[:, indices] = teacher_logits(teachers, pixels)
                bar.update(len(indices))
            distributed.sum_to_first(logits)
            if distributed.rank() == 0:
                require_finite(logits, paths)
                logits = logits.astype(args.dtype, copy=False)
                stored[view] = write_view(args.output, view, logits)
            tqdm.write(f"view {view} stored")
    return stored


def in_batches(rows, batch_size):
    """The rows of an array in pieces of at most batch_size."""
    return np.split(rows, range(batch_size, len(rows), batch_size))


def find_teachers():
    """Every teacher in runs/*/best.pt."""
    found = sorted(Path("runs").glob("*/best.pt"))
    teachers = [path for path in found if peek(path)["kind"] == "teacher"]
    if not teachers:
        raise UserError("no teacher in runs/*/best.pt; run train_teacher.py or name checkpoints")
    return teachers


def load_teachers(paths, device):
    """(networks, their records); refuses students, and teachers of other classes or pictures."""
    teachers, records = [], []
    for path in paths:
        teacher, record = models.load_model(path, device)
        if record["kind"] != "teacher":
            raise UserError(
                f"{path}: a {record['kind']}, not a teacher; name checkpoints of train_teacher.py"
            )
        teachers.append(teacher)
        records.append(record)
        require_same(
            {**records[0]["data"], "dir": None},
            {**record["data"], "dir": None},
            f"{path} against {paths[0]}",
            "an ensemble needs teachers trained on the same pictures and split",
        )
        print(f"teacher {path}: {record['model']} at {record['img_size']} px")
    return teachers, records


def open_pictures(data, args):
    """(train, val, data record) as the teachers saw them, wherever the folder lies now."""
    moved = {"dir": args.data_dir} if args.data_dir else {}
    return splits.open_training(cli.decoded_cache(args), {**data, **moved})


def require_finite(logits, paths):
    """Refuse teachers with a logit that is no number. logits: float [teachers, N, classes]."""
    finite = np.isfinite(logits).all(axis=(1, 2))
    if not finite.all():
        raise UserError(
            f"{paths[int(finite.argmin())]}: some of its logits are not finite; "
            "train it again, with a lower --lr"
        )


def describe_teachers(paths, records):
    """Which checkpoints, as plain data."""
    return [
        {
            "path": Path(path).as_posix(),
            "weights_sha256": record["weights_sha256"],
            "model": record["model"],
            "img_size": record["img_size"],
        }
        for path, record in zip(paths, records)
    ]


def doubt(teachers, train, val, val_logits, temperatures):
    """{"val", "train"}: labels that all teachers reject, as plain data (see common/labels.py)."""
    answers = [torch.softmax(z / t, 1).numpy() for z, t in zip(val_logits, temperatures)]
    classes, device = val_logits.shape[2], next(teachers[0].parameters()).device
    votes = []
    for teacher in teachers:
        features = models.features(teacher, train, device)
        votes.append(labels.neighbour_votes(features, train.labels, classes).numpy())
    return {
        "val": labels.doubtful_pictures(val, answers),
        "train": labels.doubtful_pictures(train, votes),
    }


@torch.inference_mode()
def teacher_logits(teachers, pixels):
    """float32 array [teachers, B, classes] for pixels [B, 3, S, S]: one rendering, all teachers."""
    with models.autocast(pixels.device):
        logits = [teacher(pixels).float() for teacher in teachers]
    return torch.stack(logits).cpu().numpy()


def check(args, watch):
    """Recompute N stored picture-views, drawn at random; refuse the ensemble where they differ."""
    record = load_ensemble(args.output)
    cached = CachedLogits(args.output, record)
    device = cli.pick_device(args.device)
    teachers, _ = load_teachers([teacher["path"] for teacher in record["teachers"]], device)
    train, _, data = open_pictures(record["data"], args)
    cache = cli.decoded_cache(args)
    pool = splits.open_same_pool(cache, args.unlabelled, data, record["unlabelled"])
    pictures = train + pool if pool else train
    watch.lap("pictures")

    recipe = cli.stored_recipe(ViewRecipe, record, args.output)
    rng = np.random.default_rng(args.seed)
    picks = rng.integers(0, [1 + cached.views, len(pictures)], (args.check, 2))
    worst, largest = 0.0, 0.0
    for part in in_batches(picks, args.batch_size):
        views, indices = part.T
        pixels = render(pictures.batch(indices, device), indices, views, record["seed"], recipe)
        stored, fresh = cached.of(views, indices), teacher_logits(teachers, pixels)
        worst = max(worst, float(np.abs(stored - fresh).max()))
        largest = max(largest, float(np.abs(stored).max()))
    watch.lap("teachers")
    # The stored ones are rounded to numbers of their type.
    allowed = TOLERANCE + float(np.spacing(np.asarray(largest, record["dtype"]))) / 2
    if not worst <= allowed:
        raise UserError(
            f"{args.output}: stored logits differ from the teachers' by {worst:.2g} "
            f"(tolerance {allowed:.2g}); build again with --overwrite"
        )
    print(
        f"{args.output}: {args.check} stored picture-views recomputed, "
        f"largest difference of a logit {worst:.1e}"
    )


if __name__ == "__main__":
    cli.run(main)
