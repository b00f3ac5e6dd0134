"""Stage 3: train a ResNet18 on the cached soft targets of the ensemble and export it.

    python distill.py                                    # the distilled student
    python distill.py --alpha 0 --output runs/alone      # the stand-alone baseline, as many steps
    python distill.py runs/ensemble --alpha 0.9 --temperature 2 --steps 2000
    python distill.py --steps 50                         # seconds on a laptop

Reads   runs/ensemble/ and the pictures it was made from; no teacher is loaded
Writes  runs/student/model.pt, last.pt, log.csv
        runs/student/student.ts        TorchScript: uint8 pictures in, class probabilities out
        runs/student/student.int8.ts   the same in 8 bits: a quarter of the size, and faster
        runs/student/student.onnx, student.int8.onnx   with --onnx, for devices without torch
Next    evaluate.py, infer.py

    loss = (1 - alpha) CE(s, y) + alpha T^2 KL(ensemble at T || student at T)

The student sees the labelled and the unlabelled pictures, pass after pass, each pass in the next of
the cached views. With --alpha 0 it sees labelled pictures alone, each pass in new views. With
--mixup every one is mixed with another of its batch, and their labels and soft targets likewise.
"""

from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay

from common import (
    cli,
    distributed,
    export,
    export_onnx,
    folders,
    models,
    splits,
    training,
    validation,
)
from common.ensemble import CachedLogits, load_ensemble
from common.files import UserError, file_sha256, px
from common.losses import label_rows, labelled_cross_entropy, soft_divergence
from common.metrics import describe_rates, good_classes, numbers_of
from common.views import ViewRecipe, mixup, render, shares

STEPS, EMBEDDED_STEPS = 2000, 552  # the embedded set's chain from scratch takes a few minutes
MISS_RATE = 0.05  # share of the defects that may pass
INT8_DROP = 0.5  # points that an int8 file may lose
CALIBRATION_PICTURES, CALIBRATION_BATCH = 512, 32  # training views that int8 ranges come from


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("ensemble", nargs="?", default="runs/ensemble",
                   help="folder made by build_ensemble.py (default: %(default)s)")
    p.add_argument("--alpha", type=cli.fraction, default=0.9,
                   help="share of the soft targets in the loss; 0 is the baseline "
                   "(default: %(default)s)")
    p.add_argument("--temperature", type=cli.positive_float, default=2.0,
                   help="T that softens teachers and student in the loss (default: %(default)s)")
    p.add_argument("--mixup", action="store_true",
                   help="mix each picture, and what is said of it, with another: for few pictures "
                   "and many steps")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--pretrained", nargs="?", choices=models.RESNET18, const="torchvision",
                       help="start from ImageNet weights of torchvision (the default) or timm "
                       "(needs a network once)")
    start.add_argument("--weights", metavar="FILE",
                       help="start from a ResNet18 of torchvision or timm (.safetensors, .pth)")
    p.add_argument("--steps", type=cli.positive_int, metavar="N",
                   help=f"batches to train on (default: {STEPS}; {EMBEDDED_STEPS} for the embedded "
                   "set from scratch); at 128 px one takes about 0.3 s on two CPU cores")
    p.add_argument("--seed", type=cli.seed, default=0,
                   help="of initialisation and order; the views are the ensemble's "
                   "(default: %(default)s)")
    p.add_argument("--output", default="runs/student",
                   help="run folder to write (default: %(default)s)")

    g = p.add_argument_group("pictures")
    g.add_argument("--data-dir",
                   help="the pictures' folder (default: where the ensemble found them)")
    g.add_argument("--unlabelled", metavar="DIR",
                   help="the unlabelled pictures' folder (default: likewise)")
    g.add_argument("--img-size", type=cli.picture_size,
                   help="px the student sees, N or HxW (default: the view size)")
    cli.add_training_flags(p)

    g = p.add_argument_group("export; with --resume a finished student is exported again, with "
                             "the threshold's flags as they were, and --max-int8-drop as when the "
                             "run began, where they are not given")
    g.add_argument("--good-class", nargs="+", action="extend", metavar="NAME",
                   help="the classes that are no defect (default: those called good or ok)")
    target = g.add_mutually_exclusive_group()
    target.add_argument("--max-miss-rate", type=cli.open_fraction,
                        help="share of the defects that may pass, with 95 %% confidence, for the "
                        f"threshold (default: {MISS_RATE})")
    target.add_argument("--max-false-alarm-rate", type=cli.open_fraction,
                        help="share of the good parts that may be rejected, instead")
    g.add_argument("--max-int8-drop", type=cli.non_negative_float,
                   help="points of validation accuracy, plain and balanced, that an int8 file may "
                   f"lose, or one picture; else it is not written (default: {INT8_DROP})")
    g.add_argument("--onnx", action="store_true",
                   help="write both files as ONNX too (needs onnx, onnxscript and onnxruntime)")
    cli.add_common_flags(p)
    return p.parse_args()


@distributed.processes()
def main():
    args = parse_arguments()
    output = Path(args.output)
    distributed.check_batch(args.batch_size)
    with distributed.hold(output):
        training.check_run_folder(output, args.resume, args.overwrite)
        # What --onnx has written before is written again, or two exports would stand side by side.
        onnx = args.onnx or args.resume and (output / "student.onnx").is_file()
        if onnx:
            export_onnx.require_packages()
        if args.resume:
            keep_operating_point(output, args)
        distil(output, onnx, args)
    cli.print_laps()


def distil(output, onnx, args):
    """Train the student into the run folder `output` and export it."""
    # What the ensemble was made from, and what it said.
    spec = load_ensemble(args.ensemble)
    if args.alpha and not args.resume:
        for file in filter(Path.is_file, models.changed_teachers(spec)):
            print(f"warning: {args.ensemble}: {file} is damaged, or another teacher now than then")
    recipe = cli.recipe(ViewRecipe.from_dict, spec["view_recipe"], args.ensemble)
    device = cli.pick_device(args.device)
    with distributed.first_then_others():
        where = args.data_dir, args.unlabelled
        opened = splits.open_as_taught(cli.decoded_cache(args), spec, *where)
        labelled, everything, val, dataset = opened
        check_good_classes(dataset["classes"], args.good_class)
        if not args.balance_classes:
            training.say_rare(labelled.labels, dataset["classes"])
    cache = CachedLogits(args.ensemble, spec) if args.alpha else None
    pictures = everything if args.alpha else labelled
    cli.lap("pictures")

    # The student.
    with distributed.first_then_others():
        model, groups = create(dataset, args)
    models.on_device(model, device)
    run = start_run(model, groups, dataset, spec, args)
    taught = lesson(labelled, everything, cache, args.mixup)
    print(f"resnet18 at {px(model.img_size)}: {taught}, {run}")

    stored_views = cache.views if cache else None
    batches = run.batches(pictures, args.batch_size, args.balance_classes, stored_views)
    for indices, views, batch in batches:
        pixels = render(batch, indices, views, spec["seed"], recipe)
        y = label_rows(pictures.labels[indices], len(dataset["classes"])).to(device)
        q = cache.targets(views, indices, args.temperature).to(device) if cache else y
        if args.mixup:
            share = distributed.share(shares(args.seed, run.steps_done, args.batch_size))
            pixels, y, q = (mixup(rows, share) for rows in (pixels, y, q))

        with models.autocast(device):
            logits = run.network(pixels)
        run.step(loss_of(logits.float(), y, q, args.alpha, args.temperature))
        if run.due:
            run.validate(val)
    cli.lap("training")

    if distributed.rank() == 0:
        export_student(output, everything, val, spec["seed"], recipe, onnx, args)
    cli.lap("export")


def create(dataset, args):
    """The student and its AdamW parameter groups."""
    torch.manual_seed(args.seed)
    img_size = args.img_size or dataset["view_size"]
    start = (None, None) if args.resume else (args.pretrained, args.weights)
    model = models.create_student(len(dataset["classes"]), img_size, *start)
    return model, param_groups_weight_decay(model.backbone, args.weight_decay)


def start_run(model, groups, dataset, spec, args):
    """The `Run` of a student, begun or resumed. spec: of the ensemble."""
    short = folders.is_embedded(dataset["dir"]) and not models.starts_warm(vars(args))
    steps = args.steps or (EMBEDDED_STEPS if short else STEPS)
    schedule = training.Schedule(steps, args.lr, args.clip_grad, args.seed)
    run = training.Run(model, groups, schedule, Path(args.output), {
        "kind": "student",
        "model": "resnet18",
        "classes": dataset["classes"],
        "img_size": model.img_size,
        "dataset": dataset,
        "view_recipe": spec["view_recipe"],
        "args": vars(args),
        "ensemble_sha256": file_sha256(Path(args.ensemble) / "ensemble.json"),
    })
    run.start(args.resume)
    return run


def loss_of(logits, y, q, alpha, T):
    """The loss at the head of this file, of a batch: logits, labels y and soft targets q at T."""
    loss = labelled_cross_entropy(logits, y)
    if alpha:
        loss = (1 - alpha) * distributed.label_weight(y) * loss
        loss = loss + alpha * T**2 * soft_divergence(q, logits / T)
    return loss


def lesson(labelled, everything, cache, mixed):
    """What the student learns from, in words."""
    how = ", mixed in pairs" if mixed else ""
    if not cache:
        return f"{len(labelled)} labelled pictures (alpha 0: no teacher){how}"
    return (
        f"{len(labelled)} labelled and {len(everything) - len(labelled)} unlabelled pictures, "
        f"{cache.views} cached views{how}"
    )


def export_student(output, pictures, val, seed, recipe, onnx, args):
    """Export model.pt as student.ts and student.int8.ts, and as ONNX where that is asked for.

    seed, recipe: of the views of `pictures` that the ranges of int8 are taken from.
    """
    student, state = models.load_model(output / "model.pt", torch.device("cpu"))
    order = np.random.default_rng(args.seed).permutation(len(pictures))
    some = order[:CALIBRATION_PICTURES]

    def views():
        for part in np.array_split(some, -(-len(some) // CALIBRATION_BATCH)):
            batch = pictures.batch(part)
            yield render(batch, part, np.ones(len(part), int), seed, recipe)

    dataset = state["dataset"]
    about = {
        "classes": state["classes"],
        "good_classes": good_classes(state["classes"], args.good_class),
        "view_size": dataset["view_size"],
        "white_level": dataset["white_level"],
        "group_regex": dataset["group_regex"],
        "weights_sha256": state["weights_sha256"],
        "checkpoint_sha256": file_sha256(output / "model.pt"),
        "ensemble_sha256": state["ensemble_sha256"],
        "data_fingerprint": dataset["fingerprint"],
        "calibration_pictures": len(some),
    }
    goal, target = "miss", args.max_miss_rate or MISS_RATE
    if args.max_false_alarm_rate:
        goal, target = "false_alarm", args.max_false_alarm_rate
    int8_drop = INT8_DROP if args.max_int8_drop is None else args.max_int8_drop
    parts = validation.groups_of(val, dataset["group_regex"])
    limits = export.Limits(goal, target, int8_drop, parts)
    exported = export.export_student(student, val, views, about, limits, output, onnx)
    for name, metadata in exported.items():
        announce(output / name, metadata)
    metadata, drawn = exported["student.ts"], folders.is_embedded(dataset["dir"])
    if metadata["operating_point"] and not drawn:  # one picture like no other
        warn_of_repeats(cli.decoded_cache(args), val, dataset, metadata)


def warn_of_repeats(cache, val, dataset, metadata):
    """Say so where pictures that the promise of a threshold counts nearly repeat each other.

    cache: the decoded pictures'; val: `Pictures`; metadata: of a file with a threshold.
    """
    goal = metadata["operating_point"]["goal"]
    good = numbers_of(metadata["good_classes"], metadata["classes"])
    rows = np.flatnonzero(np.isin(val.labels, good) == (goal == "false_alarm"))
    counted = val.take(rows)
    parts = validation.groups_of(counted, dataset["group_regex"])
    (detailed,) = splits.in_detail(cache, dataset, counted)
    pairs = validation.compare(cache.home, detailed, np.arange(len(rows)))
    told_apart, all_parts = len(set(validation.joined(parts, pairs))), len(set(parts))
    if told_apart < all_parts:
        kind = "defects" if goal == "miss" else "good parts"
        print(
            f"warning: of {all_parts} validation {kind} only {told_apart} are no near-duplicates of"
            " others; if those show the same parts, the threshold promises too much, and "
            "train_teacher.py --group-regex names parts"
        )


def keep_operating_point(output, args):
    """Fill in flags of the threshold that are not given: of the last export, or the run's start."""
    begun = [output / name for name in ("model.pt", "last.pt") if (output / name).is_file()]
    before = {**vars(args), **(models.read_header(begun[0])["args"] if begun else {})}
    try:
        metadata = export.load_exported(output / "student.ts")[1]
        before["good_class"] = metadata["good_classes"] or before["good_class"]
        if point := metadata["operating_point"]:
            before |= {"max_miss_rate": None, "max_false_alarm_rate": None}
            before[f"max_{point['goal']}_rate"] = point["target"]
    except UserError:  # missing, or damaged
        pass
    args.good_class = args.good_class or before["good_class"]
    if args.max_int8_drop is None:
        args.max_int8_drop = before["max_int8_drop"]
    if not (args.max_miss_rate or args.max_false_alarm_rate):
        args.max_miss_rate = before["max_miss_rate"]
        args.max_false_alarm_rate = before["max_false_alarm_rate"]


def check_good_classes(classes, wanted):
    """Refuse wrong names of good classes, and say where none leaves the files without threshold."""
    good, names = good_classes(classes, wanted), ", ".join(classes)
    unknown = [name for name in good if name not in classes]
    if unknown:
        raise UserError(f"--good-class {unknown[0]}: the classes are {names}")
    if set(good) == set(classes):
        raise UserError("--good-class: names all classes, so that nothing would be a defect")
    if not good:
        print(
            f"no class of {names} is called good or ok, so the files will hold no threshold; "
            "--good-class NAME [NAME ...] says which are no defect (also later, with --resume)"
        )


def announce(path, metadata):
    """Say of a file that was written what it does on validation."""
    metrics, point = metadata["validation"], metadata["operating_point"]
    print(
        f"{path}: val accuracy {metrics['accuracy']:.3f}, balanced "
        f"{metrics['balanced_accuracy']:.3f}, NLL {metrics['nll']:.3f}, "
        f"temperature {metadata['temperature']:.2f}, {path.stat().st_size / 1e6:.1f} MB"
    )
    print(f"{path}: sha256 {file_sha256(path)}")
    if point:
        good, by_part = " or ".join(metadata["good_classes"]), bool(metadata["group_regex"])
        print(describe_threshold(point, good, by_part))


def describe_threshold(point, good, by_part=False):
    """`choose_threshold`'s result in words, and a warning where too few pictures support it.

    good: names of the good classes; by_part: whether the pictures of a part counted once.
    """
    defects, target = "defective parts" if by_part else "defects", 100 * point["target"]
    kind = defects if point["goal"] == "miss" else "good parts"
    text = (
        f"threshold {point['threshold']:.4f} on the probability of not being {good}, for at most "
        f"{target:g} % of the {kind}; on validation "
        f"{describe_rates(point['validation'], by_part)}"
    )
    if point["pictures"] < point["needed"]:
        text += (
            f"\nwarning: {point['pictures']} validation {kind}, none of them wrong, promise with "
            f"95 % confidence no better than {100 * point['promised']:.1f} %; {target:g} % needs "
            f"{point['needed']}"
        )
    return text


if __name__ == "__main__":
    cli.run(main)
