"""Stage 3: train a ResNet18 on the cached soft targets of the ensemble and export it.

    python distill.py                                          # the distilled student
    python distill.py --alpha 0 --output runs/alone            # the stand-alone baseline, same recipe and steps
    python distill.py runs/ensemble --alpha 0.9 --temperature 2 --epochs 20

Reads   runs/ensemble/ and the pictures it was made from; no teacher is loaded
Writes  runs/student/best.pt, last.pt, log.csv
        runs/student/student.ts   TorchScript: uint8 pictures in, class probabilities out
Next    evaluate.py, infer.py

    loss = (1 - alpha) CE(s, y) + alpha T^2 KL(ensemble at T || student at T)

An epoch is a pass over the labelled and the unlabelled pictures. With --alpha 0 it has as many
steps, all on labelled pictures, each pass in new views.
"""

from pathlib import Path

import torch

from common import cli, data, models, training
from common.checkpoints import exclusive, file_sha256, require_same
from common.ensemble import load_ensemble, open_views, soft_targets
from common.export import export
from common.losses import distillation_loss, fit_temperature, mixture
from common.metrics import score
from common.views import batch_plan, recipe_from_record, render

STEPS, EMBEDDED_EPOCHS = 1000, 5  # the embedded set's chain must end in 8 minutes on two cores


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
    with watch("pictures"):
        train, val, data_record = open_pictures(ensemble, args)
        cached = open_views(args.ensemble, ensemble) if args.alpha else []
    classes, view_size = data_record["classes"], data_record["view_size"]
    labelled = int((train.labels != data.UNLABELLED).sum())
    used = len(train) if args.alpha else labelled
    steps = -(-len(train) // args.batch_size)
    embedded = Path(data_record["dir"]) == Path(data.EMBEDDED)
    args.epochs = args.epochs or (EMBEDDED_EPOCHS if embedded else training.default_epochs(STEPS, steps))
    print(f"{labelled} labelled and {len(train) - labelled} unlabelled pictures at {view_size} px, {steps} steps per epoch, "
          + (f"{len(cached) - 1} cached views" if args.alpha else "labelled pictures only (alpha 0)"))

    torch.manual_seed(args.seed)
    model = models.create_student(len(classes), args.img_size or view_size, args.pretrained, args.weights)

    def batches(first_step, steps):
        for indices, passes in batch_plan(used, args.batch_size, args.seed, first_step, steps):
            views = 1 + (passes % (len(cached) - 1) if cached else passes)
            soft = soft_targets(cached, ensemble, views, indices, args.temperature).to(device) if cached else None
            pixels = render(train.batch(indices, device), indices, views, ensemble["seed"], recipe)
            yield pixels, (train.labels[indices].to(device), soft)

    def loss(logits, target):
        return distillation_loss(logits, *target, args.alpha, args.temperature)

    record = {"kind": "student", "model": models.STUDENT, "classes": classes, "img_size": args.img_size or view_size,
              "data": data_record, "view_recipe": ensemble["view_recipe"], "args": training.plain_args(args),
              "ensemble_sha256": file_sha256(Path(args.ensemble) / "ensemble.json")}
    groups = models.parameter_groups(model, args.weight_decay)
    training.fit(model, groups, batches, loss, val, steps, output, record, args, device, watch)
    with watch("export"):
        finish(output, val, device)


def open_pictures(ensemble, args):
    """The pictures the ensemble was made from, in its numbering: (train with pool, val, data record)."""
    where = {**ensemble["data"], **({"dir": args.data_dir} if args.data_dir else {})}
    train, val, data_record = data.open_training_data(where, args)
    pool = ensemble["unlabelled"]
    if pool:
        pack = data.open_pack(args.unlabelled or pool["dir"], data_record["view_size"], args, labelled=False)
        require_same({"unlabelled": pool["fingerprint"]}, {"unlabelled": pack.fingerprint}, f"{pack.folder} against {args.ensemble}",
                     "give the --unlabelled folder the ensemble was made from, or build it again")
        train = data.with_pool(train, pack)
    require_same({"pictures": ensemble["pictures"]}, {"pictures": len(train)}, args.ensemble, "build the ensemble again")
    return train, val, data_record


def finish(output, val, device):
    """Calibrate the best student on validation and write student.ts beside it."""
    model, state = models.load_model(output / "best.pt", device)
    logits = models.predict(model, val, device)
    temperature = fit_temperature(logits, val.labels)
    metrics = score(mixture(logits[None], [temperature], [1.0]), val.labels)
    metadata = {"classes": state["classes"], "img_size": state["img_size"],
                "parameters": sum(p.numel() for p in model.parameters()), "checkpoint_sha256": file_sha256(output / "best.pt"),
                "ensemble_sha256": state["ensemble_sha256"], "data_fingerprint": state["data"]["fingerprint"],
                "validation": {key: metrics[key] for key in ("accuracy", "balanced_accuracy", "nll", "ece", "n")}}
    export(model, state["data"]["view_size"], temperature, metadata, output / "student.ts")
    print(f"{output / 'student.ts'}: val accuracy {metrics['accuracy']:.3f}, balanced {metrics['balanced_accuracy']:.3f}, "
          f"NLL {metrics['nll']:.3f}, temperature {temperature:.2f}, {(output / 'student.ts').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
