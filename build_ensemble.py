"""Stage 2: combine teachers and store what they say about every training view on disk.

    python build_ensemble.py                                 # every teacher under runs/
    python build_ensemble.py runs/a/model.pt runs/b/model.pt --views 8 --unlabelled my_parts/pool
    python build_ensemble.py --check 200                     # recompute 200 stored answers

Reads   teachers' model.pt, and the pictures they were trained on
Writes  runs/ensemble/ensemble.json   teachers, classes, data, views, temperatures, weights
        runs/ensemble/view_VVV.npy    raw logits [teachers, pictures, classes] of views 1, 2, ...
Next    distill.py

An interrupted build goes on where it stopped. Costs one forward pass per teacher, picture and view.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import cli, distributed, folders, models, splits, validation
from common.audit.label_errors import find_label_errors, label_error_lines
from common.ensemble import (
    SCHEMA,
    CachedLogits,
    load_ensemble,
    missing_views,
    start_build,
    views_before,
    write_view,
)
from common.files import UserError, px, require_same, save_json, versions
from common.losses import fit_temperature, fit_weights, product_of_experts
from common.metrics import score
from common.pictures import list_pictures
from common.views import ViewRecipe, render

# Stored by default: of few pictures many views, since a student learns those by heart that it sees
# again. From scratch the embedded set's has a quarter of the steps.
PICTURE_VIEWS, SHORT_VIEWS, FEWEST, MOST = 20_000, 10_000, 4, 200
OPEN_FILES = 500  # views that may be asked for: each is one, and many systems allow a process 1024
OF_TEACHER = ("weights_sha256", "model", "img_size")  # what ensemble.json says of each
NOISE = 1e-3  # of a logit, for --check: what float32 adds up to over the layers
# Seeds from here on are no teacher's: where it was trained, it would repeat the label.
FIRST_SEED = cli.SEEDS


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("checkpoint", nargs="*",
                   help="teachers' model.pt (default: every teacher in runs/*/model.pt)")
    p.add_argument("--views", type=cli.positive_int,
                   help="augmented views of each picture to store (default: as many as make "
                   f"{PICTURE_VIEWS} picture-views, {SHORT_VIEWS} for the embedded set from "
                   f"scratch, at least {FEWEST} and at most {MOST})")
    p.add_argument("--unlabelled", metavar="DIR",
                   help="pictures without labels that take part in distillation (default: "
                   "unlabelled/ in the data folder where there is one; 'none' for none)")
    p.add_argument("--dtype", choices=["float32", "float16"], default="float32",
                   help="of the stored logits; float16 takes half the space and changes soft "
                   "targets by less than 0.001 (default: %(default)s)")
    p.add_argument("--check", type=cli.positive_int, metavar="N",
                   help="instead of building, recompute N stored picture-views and compare")
    p.add_argument("--seed", type=cli.seed, default=0,
                   help="of the views, which no teacher was trained on (default: %(default)s)")
    p.add_argument("--output", default="runs/ensemble",
                   help="folder to write (default: %(default)s)")
    p.add_argument("--overwrite", action="store_true",
                   help="replace an ensemble of other teachers or settings")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=64,
                   help="pictures per forward pass (default: %(default)s)")

    g = p.add_argument_group("pictures and views")
    g.add_argument("--data-dir",
                   help="the pictures' folder (default: where the teachers found them)")
    g.add_argument("--view-recipe", nargs="+", action="extend", default=[], metavar="NAME=NUMBER",
                   help="change the views from those the first teacher saw, as in zoom_min=0.6")
    cli.add_leak_flags(g)
    cli.add_common_flags(p)
    return p.parse_args()


@distributed.processes()
def main():
    args = parse_arguments()
    if args.check:
        check(args)
    else:
        with distributed.hold(args.output):
            build(args)
    cli.print_laps()


def build(args):
    """Fit the mixture on validation, then store what the teachers say of every view."""
    if args.views and args.views > OPEN_FILES:
        raise UserError(f"--views {args.views}: at most {OPEN_FILES}, since each is an open file")
    paths = args.checkpoint or find_teachers()
    device = cli.pick_device(args.device)
    teachers, states = load_teachers(paths, device)
    with distributed.first_then_others():
        cache = cli.decoded_cache(args)
        train, val, dataset = splits.open_training(cache, states[0]["dataset"], args.data_dir)
        pool, unlabelled = open_pool(cache, val, dataset, args)
    pictures = train + pool if pool else train
    cli.lap("pictures")

    # What this ensemble is; a folder with views of another one is refused.
    recipe = choose_recipe(paths, states, args.view_recipe)
    folder = Path(args.output)
    spec = {
        "schema": SCHEMA,
        "teachers": [
            {"path": Path(path).as_posix(), **{key: state[key] for key in OF_TEACHER}}
            for path, state in zip(paths, states)
        ],
        "dataset": dataset,
        "unlabelled": unlabelled,
        "pictures": len(pictures),
        "view_recipe": recipe.as_dict(),
        "seed": FIRST_SEED + args.seed,
        "dtype": args.dtype,
    }

    warm = any(models.starts_warm(state["args"]) for state in states)
    short = folders.is_embedded(dataset["dir"]) and not warm
    views = args.views or views_before(folder, spec) or default_views(len(pictures), short)

    # Temperatures, weights and label errors.
    if distributed.rank() == 0:
        start_build(folder, {**spec, "views_asked": views}, args.overwrite)
        val_logits = torch.stack([models.predict(teacher, val, device) for teacher in teachers])
        require_finite(val_logits.numpy(), paths)
        mixture = fit_mixture(val_logits, val.labels, paths)
        cli.lap("validation")
        scaled = scale(val_logits, mixture["temperatures"])
        label_errors = find_label_errors(teachers, train, val, torch.softmax(scaled, dim=2))
        for line in label_error_lines(label_errors, dataset["classes"]):
            print(line)
        cli.lap("label errors")

    # The views that an earlier start has not stored.
    absent = torch.zeros(1 + views)  # of processes but the first it stays zero
    if distributed.rank() == 0:
        absent[missing_views(folder, views)] = 1
    missing = distributed.mean(absent).nonzero().flatten().tolist()
    print(f"{len(pictures)} pictures, {views} views, {len(missing)} of them to be computed")
    store_views(missing, teachers, pictures, recipe, spec, args)
    cli.lap("teachers")
    if distributed.rank() == 0:
        rest = {"label_errors": label_errors, "versions": versions(), "views": views}
        save_json({**spec, **mixture, **rest}, folder / "ensemble.json")
        print(f"{folder}: {views} views of {len(pictures)} pictures, {len(teachers)} teachers")


# --------------------------------------------------------------------------- teachers and pictures


def default_views(count, short=False):
    """How many views of `count` pictures to store; short: for a student of few steps."""
    wanted = SHORT_VIEWS if short else PICTURE_VIEWS
    return min(MOST, max(FEWEST, wanted // count))


def find_teachers():
    """Every teacher in runs/*/model.pt."""
    runs = models.trained_runs()
    teachers = [path for path, header in runs.items() if header["kind"] == "teacher"]
    if not teachers:
        raise UserError("no teacher in runs/*/model.pt; run train_teacher.py or name checkpoints")
    return teachers


def load_teachers(paths, device):
    """(networks, their checkpoints); refuses students, and teachers of other pictures."""
    teachers, states = [], []
    for path in paths:
        teacher, state = models.load_model(path, device)
        if state["kind"] != "teacher":
            raise UserError(
                f"{path}: a {state['kind']}, not a teacher; name checkpoints of train_teacher.py"
            )
        teachers.append(teacher)
        states.append(state)
        require_same(
            {**states[0]["dataset"], "dir": None},
            {**state["dataset"], "dir": None},
            f"{path} against {paths[0]}",
            "an ensemble needs teachers of the same pictures and split; name those that belong "
            "together, or move the others out of runs/",
        )
        print(f"teacher {path}: {state['model']} at {px(state['img_size'])}")
    return teachers, states


def open_pool(cache, val, dataset, args):
    """(unlabelled pictures, what ensemble.json says of them), or (None, None) without a pool.

    Refuses test and validation pictures and their parts among them, or drops them; near-duplicates
    of validation pictures are counted, or go too.
    """
    folder = folders.pool_folder(dataset["dir"], args.unlabelled)
    if folder is None:
        return None, None
    if folder.is_dir() and not list_pictures(folder):
        raise UserError(f"{folder}: holds no pictures; remove it or say --unlabelled none")
    pool = splits.open_pool(cache, folder, dataset)
    others = [val, *splits.open_to_compare(cache, dataset)]
    leaks = args.drop_leaks, args.allow_leakage
    dropped = splits.leaked_paths(pool, others, "unlabelled", "test or validation", *leaks)
    dropped += splits.unlabelled_of_parts(pool, others, dataset["group_regex"], *leaks)
    if not folders.is_embedded(dataset["dir"]):  # whose pictures are drawn one by one
        in_detail = splits.in_detail(cache, dataset, pool, val)
        dropped += validation.repeated(cache.home, *in_detail, "unlabelled", args.drop_leaks)
    dropped, fingerprint = list(dict.fromkeys(dropped)), pool.fingerprint()
    spec = {"dir": str(folder), "fingerprint": fingerprint, "dropped": dropped}
    return splits.without(pool, dropped), spec


def choose_recipe(paths, states, changes):
    """The recipe of the views: the first teacher's, with changes; says whose is another one."""
    first = cli.recipe(ViewRecipe.from_dict, states[0]["view_recipe"], paths[0])
    for path, state in zip(paths, states):
        if cli.recipe(ViewRecipe.from_dict, state["view_recipe"], path) != first:
            print(f"views as {paths[0]} saw them; {path} was trained on others")
    return cli.recipe(first.changed, changes, "--view-recipe")


# ------------------------------------------------------------------- what the teachers say of val


def fit_mixture(val_logits, val_labels, paths):
    """Fit temperatures and weights on validation, and print what they give.

    val_logits: float32 [teachers, N, classes]; val_labels: int64 [N]; paths: of the teachers.
    Returns plain data for ensemble.json.
    """
    temperatures = [fit_temperature(logits, val_labels) for logits in val_logits]
    scaled = scale(val_logits, temperatures)
    weights = fit_weights(scaled, val_labels)

    rows = list(zip(map(str, paths), weights, temperatures, torch.softmax(scaled, dim=2)))
    together = product_of_experts(val_logits, temperatures, weights)
    rows.append(("the ensemble", sum(weights), 1.0, together))
    head = f"on {len(val_labels)} validation pictures:"
    print(f"{head:43}weight  temperature  accuracy  balanced    NLL")
    validation = {}
    for name, weight, temperature, probabilities in rows:
        s = score(probabilities, val_labels)
        kept = ("accuracy", "balanced_accuracy", "nll", "n")
        validation[name] = {key: s[key] for key in kept}
        print(
            f"  {name:40} {weight:7.3f}  {temperature:11.2f}  {s['accuracy']:8.3f}  "
            f"{s['balanced_accuracy']:8.3f}  {s['nll']:5.3f}"
        )
    return {
        "temperatures": temperatures,
        "weights": weights,
        "validation": validation,
    }


def scale(logits, temperatures):
    """Each teacher's logits over its temperature: float32 [teachers, N, classes]."""
    return torch.stack([z / t for z, t in zip(logits, temperatures)])


def require_finite(logits, paths):
    """Refuse teachers with a logit that is no number. logits: float [teachers, N, classes]."""
    finite = np.isfinite(logits).all(axis=(1, 2))
    if not finite.all():
        raise UserError(
            f"{paths[int(finite.argmin())]}: some of its logits are not finite; "
            "train it again, with a lower --lr"
        )


# -------------------------------------------------------------------- what they say of the views


def store_views(missing, teachers, pictures, recipe, spec, args):
    """Compute and write the views that are missing.

    Whole batches are shared out among processes, so that several round as one does.
    """
    device = next(teachers[0].parameters()).device
    paths = [teacher["path"] for teacher in spec["teachers"]]
    batches = distributed.share(in_batches(np.arange(len(pictures)), args.batch_size))
    shape = (len(teachers), len(pictures), len(spec["dataset"]["classes"]))
    total = len(missing) * sum(map(len, batches))
    hidden = distributed.rank() > 0 or None  # None: only where there is no terminal
    with tqdm(total=total, desc="logits", disable=hidden, leave=False) as bar:
        for view in missing:
            logits = np.zeros(shape, np.float32)
            for indices in batches:
                batch = pictures.batch(indices, device)
                pixels = render(batch, indices, np.full(len(indices), view), spec["seed"], recipe)
                logits[:, indices] = teacher_logits(teachers, pixels)
                bar.update(len(indices))
            distributed.reduce(logits)
            if distributed.rank() == 0:
                require_finite(logits, paths)
                if np.abs(logits).max() > np.finfo(args.dtype).max:
                    raise UserError(f"--dtype {args.dtype}: cannot hold a logit of "
                                    f"{np.abs(logits).max():.2g}; use float32")
                write_view(args.output, view, logits.astype(args.dtype, copy=False))
            tqdm.write(f"view {view} stored")


@torch.inference_mode()
def teacher_logits(teachers, pixels):
    """float32 array [teachers, B, classes] for pixels [B, 3, H, W]: one rendering, all teachers."""
    with models.autocast(pixels.device):
        logits = [teacher(pixels).float() for teacher in teachers]
    return torch.stack(logits).cpu().numpy()


def in_batches(rows, batch_size):
    """The rows of an array in pieces of at most batch_size."""
    return np.split(rows, range(batch_size, len(rows), batch_size))


def check(args):
    """Recompute N stored picture-views, drawn at random; refuse the ensemble where they differ."""
    spec = load_ensemble(args.output)
    cached = CachedLogits(args.output, spec)
    device = cli.pick_device(args.device)
    teachers, _ = load_teachers([teacher["path"] for teacher in spec["teachers"]], device)
    where = args.data_dir, args.unlabelled
    _, pictures, _, _ = splits.open_as_taught(cli.decoded_cache(args), spec, *where)
    cli.lap("pictures")

    recipe = cli.recipe(ViewRecipe.from_dict, spec["view_recipe"], args.output)
    rng = np.random.default_rng(args.seed)
    picks = rng.integers([1, 0], [1 + cached.views, len(pictures)], (args.check, 2))
    worst, largest = 0.0, 0.0
    for part in in_batches(picks, args.batch_size):
        views, indices = part.T
        pixels = render(pictures.batch(indices, device), indices, views, spec["seed"], recipe)
        stored, fresh = cached.of(views, indices), teacher_logits(teachers, pixels)
        worst = max(worst, float(np.abs(stored - fresh).max()))
        largest = max(largest, float(np.abs(stored).max()))
    cli.lap("teachers")
    # Another batch size or device rounds otherwise: by some steps of the types that numbers had.
    computed, kept = models.precision(device) or torch.float32, getattr(torch, spec["dtype"])
    allowed = NOISE + largest * (4 * torch.finfo(computed).eps + torch.finfo(kept).eps)
    if not worst <= allowed < np.inf:
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
