"""Stage 1: fine-tune one or several timm classifiers on a folder of pictures.

    python train_teacher.py                               # the embedded set, two default teachers
    python train_teacher.py --epochs 2 --model resnet10t  # a minute on a laptop
    python train_teacher.py --data-dir my_parts --pretrained \\
        --model vit_small_patch14_dinov2 tf_efficientnet_lite0
    torchrun --standalone --nproc-per-node 4 train_teacher.py -b 96  # a process per GPU

Reads   DIR/train/<class>/*, and DIR/val/<class>/* where it exists (else part of train is held out)
Writes  runs/<model>/best.pt   averaged weights of the epoch that was chosen on val
        runs/<model>/last.pt   all that --resume needs
        runs/<model>/log.csv   the training curve
Next    build_ensemble.py
"""

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

from common import cli, distributed, folders, models, splits, training
from common.errors import UserError
from common.losses import class_weights
from common.views import ViewRecipe, render

STEPS = 600
LABEL_SMOOTHING = 0.1  # share of the label spread over all classes
LR, EMBEDDED_LR = 1e-3, 3e-3  # the embedded set's few steps from scratch want a higher one
EMBEDDED = {"coatnet_nano_rw_224": 235, "resnet10t": 500}  # steps there, a few minutes


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("--data-dir", default=folders.EMBEDDED,
                   help="folder with train/ and optionally val/ and test*/; the default is drawn "
                   "on first use")
    p.add_argument("--model", nargs="+", default=list(EMBEDDED), metavar="NAME",
                   help="timm classifiers, trained one after the other")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true",
                       help="start from timm's weights (needs a network once)")
    start.add_argument("--weights", nargs="+", metavar="FILE",
                       help="start from weight files, one per --model")
    p.add_argument("--epochs", type=cli.positive_int, nargs="+", metavar="N",
                   help="passes over the training pictures, one number for all models or one for "
                   f"each (default: as many as make {STEPS} steps)")
    p.add_argument("--seed", type=cli.natural, default=0, help="of initialisation, order and views")
    p.add_argument("--output", default="runs", help="folder for the run folders")
    cli.add_run_flags(p)
    cli.add_device_flag(p)

    g = p.add_argument_group("pictures and views")
    g.add_argument("--view-size", type=cli.positive_int,
                   help="side in px at which pictures are stored and views are made (default: 128, "
                   "or the pictures' own size where that is less; 64 for the embedded set)")
    g.add_argument("--img-size", type=cli.positive_int,
                   help="side in px the models see, raised to whole patches (default: view size)")
    g.add_argument("--view-recipe", nargs="+", default=[], metavar="NAME=NUMBER",
                   help="change the augmentation, as in rotate=10 flip=0 (see common/views.py)")
    g.add_argument("--val-fraction", type=cli.open_fraction, default=0.2,
                   help="share of train/ held out where there is no val/")
    g.add_argument("--group-regex", type=cli.regex,
                   help="pictures whose path gives the same first match group stay on one side")
    cli.add_white_level_flag(g)
    leaks = g.add_mutually_exclusive_group()
    leaks.add_argument("--drop-leaks", action="store_true",
                       help="leave training pictures out that a test* folder holds too")
    leaks.add_argument("--allow-leakage", action="store_true",
                       help="train although test pictures are among the training pictures")

    cli.add_training_flags(p, None, f" (default: {LR:g}; {EMBEDDED_LR:g} on the embedded set)")
    cli.add_reading_flags(p)
    return p.parse_args()


@distributed.processes()
def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    recipe = cli.changed_recipe(ViewRecipe(), args.view_recipe)
    weights, epochs = args.weights or [None], args.epochs or [None]
    check_models(args.model, weights, epochs)
    distributed.check_batch(args.batch_size)

    # A run is never overwritten unasked. An interruption may leave teachers that had not begun.
    homes = [Path(args.output) / name for name in args.model]
    begun = [home for home in homes if training.has_run(home)]
    for home in homes:
        resume = args.resume and (home in begun or not begun)
        training.check_run_folder(home, resume, args.overwrite)

    with ExitStack() as held:
        for home in homes:
            held.enter_context(distributed.hold(home))
        device = cli.pick_device(args.device)
        with distributed.first_then_others():
            train, val, record = open_pictures(args)
        watch.lap("pictures")
        for number, name in enumerate(args.model):
            with distributed.first_then_others():
                model, groups = create(name, weights[number % len(weights)], record, args)
            model.to(device, memory_format=torch.channels_last)
            schedule = plan_steps(name, epochs[number % len(epochs)], len(train), record, args)
            run = training.Run(model, groups, schedule, homes[number], {
                "kind": "teacher",
                "model": name,
                "classes": record["classes"],
                "img_size": model.img_size,
                "data": record,
                "view_recipe": recipe.record(),
                "args": cli.plain(args),
            })
            run.start(args.resume, cli.FREE_ON_RESUME)
            print(f"{name} at {model.img_size} px: {len(train)} pictures, {run}")
            fit(run, train, val, recipe, args, watch)
    print(watch)


def check_models(names, weights, epochs):
    """Refuse names, weight files and numbers of passes that do not fit together."""
    for flag, values in (("--weights", weights), ("--epochs", epochs)):
        single = len(values) == 1 and flag == "--epochs"
        if values != [None] and len(values) != len(names) and not single:
            raise UserError(
                f"{flag} names {len(values)} for {len(names)} models; give one for each"
            )
    if len(set(names)) < len(names):
        raise UserError("--model: each name once; two runs of one model need two --output folders")
    for name in names:
        models.check_name(name)
    for file in weights:
        if file is not None and not Path(file).is_file():
            raise UserError(f"--weights {file}: no such file")


def open_pictures(args):
    """(train, val, data record); refuses test pictures among the training ones, or drops them."""
    folder = folders.data_folder(args.data_dir)
    cache = cli.decoded_cache(args)
    train, val, record = splits.open_training(cache, {
        "dir": folder.as_posix(),
        "view_size": args.view_size or folders.default_view_size(folder),
        "white_level": args.white_level,
        "val_fraction": args.val_fraction,
        "group_regex": args.group_regex,
        "dropped": [],
    })
    leaks = splits.find_leaks(cache, train + val, folders.test_folders(folder), record)
    if leaks and args.drop_leaks:
        record["dropped"] = [path for path, _ in leaks]
        train, val, record = splits.open_training(cache, record)
        print(f"{len(leaks)} training pictures left out, since a test folder holds them too")
    elif leaks and not args.allow_leakage:
        ours, theirs = leaks[0]
        raise UserError(
            f"{folder}: {len(leaks)} training pictures are test pictures too ({ours} = {theirs}); "
            "--drop-leaks leaves them out of training, --allow-leakage goes on"
        )
    print(
        f"{folder}: {len(train)} training and {len(val)} validation pictures at "
        f"{record['view_size']} px, classes {', '.join(record['classes'])}"
    )
    return train, val, record


def create(name, weights, record, args):
    """(model, parameter groups); a pretrained backbone learns more slowly than its new head."""
    torch.manual_seed(args.seed)
    img_size = args.img_size or record["view_size"]
    model = models.create_teacher(name, len(record["classes"]), img_size, args.pretrained, weights)
    if not (args.pretrained or weights):
        return model, models.parameter_groups(model, args.weight_decay)
    backbone_lr, layer_decay = models.fine_tuning_rates(model.backbone)
    return model, models.parameter_groups(model, args.weight_decay, layer_decay, backbone_lr)


def plan_steps(name, epochs, pictures, record, args):
    """The schedule of one teacher; where no epochs were asked for, as many as make its steps."""
    steps_per_epoch = -(-pictures // args.batch_size)
    embedded = folders.is_embedded(record["dir"])
    lr = args.lr or (EMBEDDED_LR if embedded else LR)
    if epochs is None:
        steps = EMBEDDED.get(name, STEPS) if embedded else STEPS
        epochs = training.epochs_for(steps, steps_per_epoch)
    return training.Schedule(
        epochs, steps_per_epoch, lr, args.ema_decay, args.clip_grad, args.seed
    )


def fit(run, train, val, recipe, args, watch):
    """Train one teacher: cross-entropy with label smoothing on fresh views in every pass."""
    device, classes = run.device, len(run.record["classes"])
    weight_of = torch.ones(classes, device=device)
    if args.balance_classes:
        weight_of = class_weights(train.labels, classes).to(device)

    for _ in run.epochs():
        plan = run.batches(len(train), args.batch_size)
        for indices, passes, batch in train.ahead(plan, device):
            pixels = render(batch, indices, 1 + passes, args.seed, recipe)
            labels = train.labels[indices].to(device, non_blocking=True)
            with models.autocast(device):
                logits = run.network(pixels)
            # Class weights stand outside: inside, torch would apply them to the smoothed share too.
            each = F.cross_entropy(
                logits.float(), labels, label_smoothing=LABEL_SMOOTHING, reduction="none"
            )
            run.step((weight_of[labels] * each).mean())
        watch.lap("training")
        run.finish_epoch(val)
        watch.lap("validation")

    if distributed.rank() == 0:
        best = run.best
        print(
            f"{run.folder / 'best.pt'}: val accuracy {best['accuracy']:.3f}, balanced "
            f"{best['balanced_accuracy']:.3f}, NLL {best['nll']:.3f} ({best['n']} pictures)"
        )


if __name__ == "__main__":
    cli.run(main)
