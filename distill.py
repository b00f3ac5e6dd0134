"""Stage 3: train a ResNet18 on the cached soft targets of the ensemble and export it.

    python distill.py                                          # the distilled student
    python distill.py --alpha 0 --output runs/alone            # the stand-alone baseline, same recipe and steps
    python distill.py runs/ensemble --alpha 0.9 --temperature 2 --epochs 20

Reads   runs/ensemble/ and the pictures it was made from; no teacher is loaded
Writes  runs/student/best.pt, last.pt, log.csv
        runs/student/student.ts        TorchScript: uint8 pictures in, class probabilities (and heatmaps) out
        runs/student/student.int8.ts   the same in 8 bits: a quarter of the size, several times as fast
Next    evaluate.py, infer.py

    loss = (1 - alpha) CE(s, y) + alpha T^2 KL(ensemble at T || student at T)

An epoch is a pass over the labelled and the unlabelled pictures. With --alpha 0 it has as many
steps, all on labelled pictures, each pass in new views.
"""

from pathlib import Path

import numpy as np
import torch

from common import audit, cli, data, models, training
from common.checkpoints import exclusive, file_sha256, require_same
from common.ensemble import load_ensemble, open_views, soft_targets
from common.export import Bfloat16Trunk, correct_head, export, float_trunk, int8_trunk
from common.losses import class_weights, distillation_loss, fit_temperature, mixture
from common.metrics import score
from common.operating_point import choose_threshold, describe, good_class
from common.views import batch_plan, recipe_from_record, render, render_blended

STEPS, EMBEDDED_EPOCHS = 1000, 6  # the embedded set's chain must end in 8 minutes on two cores


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("ensemble", nargs="?", default="runs/ensemble", help="folder made by build_ensemble.py")
    p.add_argument("--data-dir", help="the pictures' folder (default: where the ensemble found them)")
    p.add_argument("--unlabelled", metavar="DIR", help="the unlabelled pictures' folder (default: likewise)")
    p.add_argument("--alpha", type=cli.fraction, default=0.9, help="share of the soft targets in the loss; 0 is the baseline")
    p.add_argument("--temperature", type=cli.positive_float, default=2.0, help="T that softens teachers and student in the loss")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights (needs a network once)")
    start.add_argument("--weights", metavar="FILE", help="start from a ResNet18 state dict file")
    p.add_argument("--img-size", type=cli.positive_int, help="side in px the student sees (default: the view size)")
    p.add_argument("--epochs", type=cli.positive_int, help="passes over labelled and unlabelled pictures "
                   f"(default: as many as make {STEPS} steps; {EMBEDDED_EPOCHS} on the embedded set)")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=24, help="pictures per step")
    p.add_argument("--lr", type=cli.positive_float, default=1e-3, help="peak learning rate")
    cli.add_training_flags(p)
    p.add_argument("--good-class", metavar="NAME", help="the class that is no defect (default: good or ok, where there is one)")
    target = p.add_mutually_exclusive_group()
    target.add_argument("--max-miss-rate", type=cli.open_fraction, default=0.05, help="share of the defects that may pass, for the threshold")
    target.add_argument("--max-false-alarm-rate", type=cli.open_fraction, help="share of the good parts that may be rejected, instead")
    p.add_argument("--max-int8-drop", type=cli.non_negative_float, default=0.5,
                   help="points of validation accuracy that student.int8.ts may lose, or one picture; else it is not written")
    p.add_argument("--bfloat16", action="store_true", help="also write student.bf16.ts, for devices where int8 does not fit")
    p.add_argument("--calibration-pictures", type=cli.positive_int, default=512, help="training views the int8 ranges are measured on")
    p.add_argument("--seed", type=cli.natural, default=0, help="of initialisation and order; the views are the ensemble's")
    p.add_argument("--output", default="runs/student", help="run folder to write")
    cli.add_data_flags(p)
    cli.add_device_flag(p)
    return p.parse_args()


def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    output = Path(args.output)
    training.check_run_folder(output, args)
    with exclusive(output):
        distil(output, args, watch)
    print(watch)


def distil(output, args, watch):
    """Train the student into the run folder `output` and export it."""
    ensemble = load_ensemble(args.ensemble)
    recipe = recipe_from_record(ensemble["view_recipe"])
    device = cli.pick_device(args.device)
    if ensemble["unlabelled"]:
        args.unlabelled = args.unlabelled or ensemble["unlabelled"]["dir"]
    with watch("pictures"):
        labelled, train, val, data_record = open_pictures(ensemble, args)
        cached = open_views(args.ensemble, ensemble) if args.alpha else []
    with watch("audit"):
        audit.look(labelled, val, data_record, args)
    classes, view_size = data_record["classes"], data_record["view_size"]
    if args.good_class and args.good_class not in classes:
        raise cli.UserError(f"--good-class {args.good_class}: the classes are {', '.join(classes)}")
    pictures, mixup = (train, ensemble["mixup"]) if args.alpha else (labelled, 0.0)
    steps = -(-len(train) // args.batch_size)
    embedded = Path(data_record["dir"]) == Path(data.EMBEDDED)
    args.epochs = args.epochs or (EMBEDDED_EPOCHS if embedded else training.default_epochs(STEPS, steps))
    print(f"{len(labelled)} labelled and {len(train) - len(labelled)} unlabelled pictures at {view_size} px, {steps} steps per epoch, "
          + (f"{len(cached) - 1} cached views, each used {args.epochs / (len(cached) - 1):.1f} times" if args.alpha else "labelled pictures only (alpha 0)"))

    torch.manual_seed(args.seed)
    model = models.create_student(len(classes), args.img_size or view_size, args.pretrained, args.weights)

    def batches(first_step, steps):
        for indices, passes in batch_plan(len(pictures), args.batch_size, args.seed, first_step, steps):
            views = 1 + (passes % (len(cached) - 1) if cached else passes)
            soft = soft_targets(cached, ensemble, views, indices, args.temperature).to(device) if cached else None
            pixels, blended = render_blended(pictures, indices, views, ensemble["seed"], recipe, mixup, device)
            labels = pictures.labels[indices].masked_fill(blended, data.UNLABELLED)  # only the teachers know what a blend is
            yield pixels, (labels.to(device), soft)

    weights = class_weights(labelled.labels, len(classes)).to(device) if args.balance_classes else None

    def loss(logits, target):
        return distillation_loss(logits, *target, args.alpha, args.temperature, weights)

    record = {"kind": "student", "model": models.STUDENT, "classes": classes, "img_size": args.img_size or view_size,
              "data": data_record, "view_recipe": ensemble["view_recipe"], "args": training.plain_args(args),
              "ensemble_sha256": file_sha256(Path(args.ensemble) / "ensemble.json")}
    groups = models.parameter_groups(model, args.weight_decay)
    training.fit(model, groups, batches, loss, val, steps, output, record, args, device, watch)
    with watch("export"):
        finish(output, train, val, recipe, ensemble["seed"], args)


def open_pictures(ensemble, args):
    """The pictures the ensemble was made from, in its numbering: (train, train with pool, val, data record)."""
    where = {**ensemble["data"], **({"dir": args.data_dir} if args.data_dir else {})}
    labelled, val, data_record = data.open_training_data(where, args)
    train, pool = labelled, ensemble["unlabelled"]
    if pool:
        pack = data.open_pack(args.unlabelled, data_record["view_size"], args, labelled=False)
        require_same({"unlabelled": pool["fingerprint"]}, {"unlabelled": pack.fingerprint}, f"{pack.folder} against {args.ensemble}",
                     "give the --unlabelled folder the ensemble was made from, or build it again")
        train = data.with_pool(train, pack)
    require_same({"pictures": ensemble["pictures"]}, {"pictures": len(train)}, args.ensemble, "build the ensemble again")
    return labelled, train, val, data_record


def finish(output, train, val, recipe, seed, args):
    """Write the best student as student.ts and, where that loses little, as int8: each calibrated on validation."""
    cpu = torch.device("cpu")
    student, state = models.load_model(output / "best.pt", cpu)

    def answers(student, trunk):
        return models.predict(logits_of(student, trunk), val, cpu)

    trunk = float_trunk(student)
    float_logits = answers(student, trunk)
    deploy(student, trunk, float_logits, val.labels, state, args, output / "student.ts", {"precision": "float32"})
    (output / "student.bf16.ts").unlink(missing_ok=True)
    if args.bfloat16:
        trunk = Bfloat16Trunk(student)
        deploy(student, trunk, answers(student, trunk), val.labels, state, args, output / "student.bf16.ts", {"precision": "bfloat16"})

    rng = np.random.default_rng(args.seed)
    some = rng.permutation(len(train))[:args.calibration_pictures]

    def views():
        for part in np.array_split(some, -(-len(some) // 32)):
            yield render(train.batch(part, cpu), part, np.ones(len(part), int), seed, recipe)

    path = output / "student.int8.ts"
    path.unlink(missing_ok=True)
    trunk = int8_trunk(student, views())
    student = correct_head(student, trunk, views())
    int8_logits = answers(student, trunk)
    right, int8_right = (logits.argmax(1) == val.labels for logits in (float_logits, int8_logits))
    disagreement = float((int8_logits.argmax(1) != float_logits.argmax(1)).float().mean())
    lost = int(right.sum() - int8_right.sum())
    drop = 100 * lost / len(val)
    print(f"int8: {drop:+.1f} points of val accuracy lost ({lost} of {len(val)} pictures), {100 * disagreement:.1f} % of val decisions differ")
    if lost > 1 and drop > args.max_int8_drop:  # a single picture is less than few pictures can tell
        print(f"{path} not written: more than --max-int8-drop {args.max_int8_drop} points; try more --calibration-pictures, "
              "allow a larger drop, or take --bfloat16")
        return
    deploy(student, trunk, int8_logits, val.labels, state, args, path,
           {"precision": "int8", "int8_drop": drop, "int8_disagreement": disagreement, "calibration_pictures": len(some)})


def logits_of(student, trunk):
    """The student with another trunk: pixels [B, 3, S, S] -> logits [B, K]."""
    return lambda pixels: student.backbone.fc(trunk(student.normalise(pixels)).mean((2, 3)))


def deploy(student, trunk, logits, labels, state, args, path, precision):
    """Write one exported file. logits: the student's with this trunk on val; they fit temperature and threshold."""
    temperature = fit_temperature(logits, labels)
    probabilities = mixture(logits[None], [temperature], [1.0])
    metrics = score(probabilities, labels)
    good = good_class(state["classes"], args.good_class)
    point = operating_point(probabilities, labels, state["classes"].index(good), args) if good else None
    metadata = {"classes": state["classes"], "good_class": good, "operating_point": point, "img_size": state["img_size"], **precision,
                "mean": student.mean.flatten().tolist(), "std": student.std.flatten().tolist(),
                "parameters": sum(p.numel() for p in student.parameters()), "weights_sha256": state["weights_sha256"],
                "checkpoint_sha256": file_sha256(path.parent / "best.pt"),
                "ensemble_sha256": state["ensemble_sha256"], "data_fingerprint": state["data"]["fingerprint"],
                "validation": {key: metrics[key] for key in ("accuracy", "accuracy_interval", "balanced_accuracy", "nll", "ece", "n")}}
    export(student, trunk, state["data"]["view_size"], temperature, metadata, path)
    print(f"{path}: val accuracy {metrics['accuracy']:.3f}, balanced {metrics['balanced_accuracy']:.3f}, "
          f"NLL {metrics['nll']:.3f}, temperature {temperature:.2f}, {path.stat().st_size / 1e6:.1f} MB")
    if point:
        print(describe(point, good))


def operating_point(probabilities, labels, good, args):
    """The threshold for the target that was asked for, or None where val lacks good or defective pictures."""
    defective = (labels != good).numpy()
    if defective.all() or not defective.any():
        return None
    miss = None if args.max_false_alarm_rate else args.max_miss_rate
    return choose_threshold(1 - probabilities[:, good].numpy(), defective, miss, args.max_false_alarm_rate)


if __name__ == "__main__":
    cli.run(main)
