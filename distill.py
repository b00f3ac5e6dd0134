"""Stage 3: train a ResNet18 on the cached soft targets of the ensemble and export it.

    python distill.py                                    # the distilled student
    python distill.py --alpha 0 --output runs/alone      # the stand-alone baseline, as many steps
    python distill.py runs/ensemble --alpha 0.9 --temperature 2 --epochs 20
    python distill.py --epochs 1                         # a minute on a laptop

Reads   runs/ensemble/ and the pictures it was made from; no teacher is loaded
Writes  runs/student/best.pt, last.pt, log.csv
        runs/student/student.ts        TorchScript: uint8 pictures in, class probabilities out
        runs/student/student.int8.ts   the same in 8 bits: a quarter of the size, and faster
        runs/student/student.onnx, student.int8.onnx   with --onnx, for devices without torch
Next    evaluate.py, infer.py

    loss = (1 - alpha) CE(s, y) + alpha T^2 KL(ensemble at T || student at T)

An epoch is a pass over the labelled and the unlabelled pictures. With --alpha 0 it has as many
steps, all on labelled pictures, each pass in new views.
"""

from pathlib import Path

import numpy as np
import torch

from common import cli, distributed, export, folders, models, onnx_file, splits, training
from common.ensemble import CachedLogits, load_ensemble
from common.errors import UserError
from common.files import file_sha256
from common.losses import class_weights, labelled_cross_entropy, soft_divergence
from common.threshold import good_class
from common.views import ViewRecipe, render

STEPS, EMBEDDED_EPOCHS = 1000, 6  # the embedded set's chain ends in a few minutes
CALIBRATION_PICTURES, CALIBRATION_BATCH = 512, 32  # training views that int8 ranges come from


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("ensemble", nargs="?", default="runs/ensemble",
                   help="folder made by build_ensemble.py")
    p.add_argument("--alpha", type=cli.fraction, default=0.9,
                   help="share of the soft targets in the loss; 0 is the baseline")
    p.add_argument("--temperature", type=cli.positive_float, default=2.0,
                   help="T that softens teachers and student in the loss")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true",
                       help="start from torchvision's ImageNet weights (needs a network once)")
    start.add_argument("--weights", metavar="FILE",
                       help="start from a ResNet18 in torchvision's key names (.safetensors, .pth)")
    p.add_argument("--epochs", type=cli.positive_int,
                   help="passes over labelled and unlabelled pictures (default: as many as make "
                   f"{STEPS} steps; {EMBEDDED_EPOCHS} on the embedded set)")
    p.add_argument("--seed", type=cli.natural, default=0,
                   help="of initialisation and order; the views are the ensemble's")
    p.add_argument("--output", default="runs/student", help="run folder to write")
    cli.add_run_flags(p)
    cli.add_device_flag(p)

    g = p.add_argument_group("pictures")
    g.add_argument("--data-dir",
                   help="the pictures' folder (default: where the ensemble found them)")
    g.add_argument("--unlabelled", metavar="DIR",
                   help="the unlabelled pictures' folder (default: likewise)")
    g.add_argument("--img-size", type=cli.positive_int,
                   help="side in px the student sees (default: the view size)")
    cli.add_training_flags(p)

    g = p.add_argument_group("export; with --resume a finished student is exported again")
    g.add_argument("--good-class", metavar="NAME",
                   help="the class that is no defect (default: good or ok, where there is one)")
    target = g.add_mutually_exclusive_group()
    target.add_argument("--max-miss-rate", type=cli.open_fraction, default=0.05,
                        help="share of the defects that may pass, for the threshold")
    target.add_argument("--max-false-alarm-rate", type=cli.open_fraction,
                        help="share of the good parts that may be rejected, instead")
    g.add_argument("--max-int8-drop", type=cli.non_negative_float, default=0.5,
                   help="points of validation accuracy that student.int8.ts may lose, or one "
                   "picture; else it is not written")
    g.add_argument("--onnx", action="store_true",
                   help="write both files as ONNX too (needs onnx, onnxscript and onnxruntime)")
    cli.add_reading_flags(p)
    return p.parse_args()


@distributed.processes()
def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    output = Path(args.output)
    distributed.check_batch(args.batch_size)
    if args.onnx:
        onnx_file.require_packages()
    training.check_run_folder(output, args.resume, args.overwrite)
    with distributed.hold(output):
        distil(output, args, watch)
    print(watch)


def distil(output, args, watch):
    """Train the student into the run folder `output` and export it."""
    # What the ensemble was made from, and what it said.
    ensemble = load_ensemble(args.ensemble)
    recipe = cli.stored_recipe(ViewRecipe, ensemble, args.ensemble)
    device = cli.pick_device(args.device)
    with distributed.first_then_others():
        labelled, everything, val, data = open_pictures(ensemble, args)
    classes = data["classes"]
    cache = CachedLogits(args.ensemble, ensemble) if args.alpha else None
    pictures = everything if args.alpha else labelled
    watch.lap("pictures")

    # The student.
    with distributed.first_then_others():
        model, groups = create(data, args)
    model.to(device, memory_format=torch.channels_last)
    weights = None
    if args.balance_classes:
        weights = class_weights(labelled.labels, len(classes)).to(device)

    # The run.
    schedule = plan_steps(len(everything), data, args)
    run = training.Run(model, groups, schedule, output, {
        "kind": "student",
        "model": "resnet18",
        "classes": classes,
        "img_size": model.img_size,
        "data": data,
        "view_recipe": ensemble["view_recipe"],
        "args": cli.plain(args),
        "ensemble_sha256": file_sha256(Path(args.ensemble) / "ensemble.json"),
    })
    run.start(args.resume, cli.FREE_ON_RESUME)
    learnt = describe(labelled, everything, cache, schedule.epochs)
    print(f"resnet18 at {model.img_size} px: {learnt}, {run}")

    alpha, T = args.alpha, args.temperature
    for _ in run.epochs():
        plan = run.batches(len(pictures), args.batch_size)
        for indices, passes, batch in pictures.ahead(plan, device):
            views = 1 + (passes % cache.views if cache else passes)
            pixels = render(batch, indices, views, ensemble["seed"], recipe)
            labels = pictures.labels[indices].to(device, non_blocking=True)

            with models.autocast(device):
                logits = run.network(pixels)
            logits = logits.float()
            loss = labelled_cross_entropy(logits, labels, weights)
            loss = loss * distributed.label_weight(labels)
            if cache:
                q = cache.targets(views, indices, T)  # of these very pixels
                q = q.to(device, non_blocking=True)
                loss = (1 - alpha) * loss + alpha * T**2 * soft_divergence(q, logits / T)
            run.step(loss)
        watch.lap("training")
        run.finish_epoch(val)
        watch.lap("validation")

    if distributed.rank() == 0:
        export_best(output, everything, val, ensemble, args)
    watch.lap("export")


def open_pictures(ensemble, args):
    """(labelled, labelled with the pool, val, data record): what the ensemble was made from."""
    cache, moved = cli.decoded_cache(args), {"dir": args.data_dir} if args.data_dir else {}
    labelled, val, data = splits.open_training(cache, {**ensemble["data"], **moved})
    pool = splits.open_same_pool(cache, args.unlabelled, data, ensemble["unlabelled"])
    if args.good_class and args.good_class not in data["classes"]:
        classes = ", ".join(data["classes"])
        raise UserError(f"--good-class {args.good_class}: the classes are {classes}")
    return labelled, labelled + pool if pool else labelled, val, data


def create(data, args):
    """The student and its AdamW parameter groups."""
    torch.manual_seed(args.seed)
    img_size = args.img_size or data["view_size"]
    model = models.create_student(len(data["classes"]), img_size, args.pretrained, args.weights)
    return model, models.parameter_groups(model, args.weight_decay)


def plan_steps(pictures, data, args):
    """The schedule; a stand-alone student has as many steps as one that sees all the pictures."""
    steps = -(-pictures // args.batch_size)
    default = training.epochs_for(STEPS, steps)
    epochs = args.epochs or (EMBEDDED_EPOCHS if folders.is_embedded(data["dir"]) else default)
    return training.Schedule(
        epochs, steps, args.lr, args.ema_decay, args.clip_grad, args.seed
    )


def describe(labelled, everything, cache, epochs):
    """What the student learns from, in words."""
    if not cache:
        return f"{len(labelled)} labelled pictures (alpha 0: no teacher)"
    uses = epochs / cache.views
    return (
        f"{len(labelled)} labelled and {len(everything) - len(labelled)} unlabelled pictures, "
        f"{cache.views} cached views, each used {uses:.1f} times"
    )


def export_best(output, pictures, val, ensemble, args):
    """Export best.pt as student.ts and student.int8.ts, and as ONNX where that is asked for."""
    student, state = models.load_model(output / "best.pt", torch.device("cpu"))
    recipe = ViewRecipe.from_record(ensemble["view_recipe"])
    order = np.random.default_rng(args.seed).permutation(len(pictures))
    some = order[:CALIBRATION_PICTURES]

    def views():
        for part in np.array_split(some, -(-len(some) // CALIBRATION_BATCH)):
            batch = pictures.batch(part)
            yield render(batch, part, np.ones(len(part), int), ensemble["seed"], recipe)

    data = state["data"]
    facts = {
        "classes": state["classes"],
        "good_class": good_class(state["classes"], args.good_class),
        "view_size": data["view_size"],
        "white_level": data["white_level"],
        "weights_sha256": state["weights_sha256"],
        "checkpoint_sha256": file_sha256(output / "best.pt"),
        "ensemble_sha256": state["ensemble_sha256"],
        "data_fingerprint": data["fingerprint"],
        "calibration_pictures": len(some),
    }
    false_alarm = args.max_false_alarm_rate
    miss = None if false_alarm else args.max_miss_rate
    limits = export.Limits(miss, false_alarm, args.max_int8_drop)
    export.export_student(student, val, views, facts, limits, output, args.onnx)


if __name__ == "__main__":
    cli.run(main)
