"""Stage 1: fine-tune one or several timm classifiers on a folder of pictures.

    python train_teacher.py                               # the embedded set, its two default teachers
    python train_teacher.py --data-dir my_parts --model vit_small_patch14_dinov2 tf_efficientnet_lite0 --pretrained
    python train_teacher.py --epochs 2 --model resnet10t  # a minute on a laptop

Reads   DIR/train/<class>/*, and DIR/val/<class>/* where there is one (else a part of train is held out)
Writes  runs/<model>/best.pt   averaged weights, of the latest epoch that val cannot tell from the best
        runs/<model>/last.pt   all that --resume needs
        runs/<model>/log.csv   the training curve
Next    build_ensemble.py
"""

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

from common import audit, cli, data, models, training
from common.checkpoints import exclusive
from common.losses import class_weights
from common.views import ViewRecipe, batch_plan, render

STEPS = 600
EMBEDDED = {"levit_conv_128s": 300, "resnet10t": 900}  # steps on the embedded set: what pays most within its 8 minutes


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("--model", nargs="+", default=list(EMBEDDED), metavar="NAME",
                   help="timm classifiers, trained one after the other")
    p.add_argument("--data-dir", default=data.EMBEDDED, help="folder with train/ and optionally val/ and test*/; "
                   "the default is drawn on first use")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help="start from timm's weights (needs a network once)")
    start.add_argument("--weights", nargs="+", metavar="FILE", help="start from weight files, one per --model")
    p.add_argument("--view-size", type=cli.positive_int, help="side in px at which pictures are stored and views are made "
                   "(default: 224, or the pictures' own size where that is less; 64 for the embedded set)")
    p.add_argument("--img-size", type=cli.positive_int, help="side in px the models see, raised to whole patches where they cut pictures into patches (default: the view size)")
    p.add_argument("--epochs", type=cli.positive_int, nargs="+", metavar="N", help="passes over the training pictures, one number for all models "
                   f"or one for each (default: as many as make {STEPS} steps)")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=24, help="pictures per step")
    p.add_argument("--lr", type=cli.positive_float, default=1e-3, help="peak learning rate of new layers")
    p.add_argument("--backbone-lr", type=cli.positive_float, help="share of --lr for the last block of a pretrained backbone "
                   "(default: 0.1 for transformers, 1 for CNNs)")
    p.add_argument("--layer-decay", type=cli.positive_float, help="learning rate of each earlier block of a pretrained backbone over the "
                   "next one's (default: 0.75 for transformers, 0.95 for CNNs)")
    cli.add_training_flags(p)
    p.add_argument("--label-smoothing", type=cli.fraction, default=0.1, help="share of the label spread over all classes")
    p.add_argument("--val-fraction", type=cli.open_fraction, default=0.2, help="share of train/ held out where there is no val/")
    p.add_argument("--group-regex", type=cli.regex, help="pictures whose path gives the same first match group stay on one side")
    p.add_argument("--split-seed", type=cli.natural, default=0, help="decides which pictures are held out")
    p.add_argument("--view-recipe", nargs="+", default=[], metavar="NAME=NUMBER",
                   help="change the augmentation, as in rotate=10 flip=0 (see common/views.py)")
    p.add_argument("--seed", type=cli.natural, default=0, help="of initialisation, order and views")
    p.add_argument("--output", default="runs", help="folder for the run folders")
    cli.add_leak_flags(p)
    cli.add_data_flags(p)
    cli.add_device_flag(p)
    return p.parse_args()


def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    recipe = ViewRecipe().changed(args.view_recipe)
    weights = args.weights or [None] * len(args.model)
    if len(weights) != len(args.model):
        raise cli.UserError(f"--weights names {len(weights)} files for {len(args.model)} models; give one for each")
    if len(set(args.model)) < len(args.model):
        raise cli.UserError("--model: each name once; for two runs of one model use two --output folders")
    if args.epochs and len(args.epochs) not in (1, len(args.model)):
        raise cli.UserError(f"--epochs names {len(args.epochs)} numbers for {len(args.model)} models; give one, or one for each")
    for name, file in zip(args.model, weights):
        models.check_name(name)
        if file is not None and not Path(file).is_file():
            raise cli.UserError(f"--weights {file}: no such file")
    folders = [Path(args.output) / name for name in args.model]
    begun = [folder for folder in folders if (folder / "last.pt").is_file()]
    for folder in begun if args.resume and begun else folders:  # an interruption may leave teachers that had not begun
        training.check_run_folder(folder, args)
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(exclusive(folder))
        train_all(weights, recipe, args, watch)
    print(watch)


def train_all(weights, recipe, args, watch):
    """Open the pictures and train every teacher on them."""
    device = cli.pick_device(args.device)
    with watch("pictures"):
        folder = data.data_folder(args.data_dir)
        view_size = args.view_size or data.default_view_size(folder)
        train, val, record = data.open_training_data(
            {"dir": str(folder), "view_size": view_size, "val_fraction": args.val_fraction,
             "split_seed": args.split_seed, "group_regex": args.group_regex, "drop_leaks": args.drop_leaks}, args)
    print(f"{folder}: {len(train)} training and {len(val)} validation pictures at {view_size} px, "
          f"classes {', '.join(record['classes'])}" + (f"; {len(record['dropped'])} left out for --drop-leaks" if args.drop_leaks else ""))
    with watch("audit"):
        audit.check(train, val, record, args)
    steps = -(-len(train) // args.batch_size)
    embedded = Path(record["dir"]) == Path(data.EMBEDDED)
    epochs = args.epochs or [training.default_epochs(EMBEDDED.get(name, STEPS) if embedded else STEPS, steps) for name in args.model]
    for name, file, args.epochs in zip(args.model, weights, epochs * (len(args.model) if len(epochs) == 1 else 1)):
        train_one(name, file, train, val, record, recipe, steps, args, device, watch)


def train_one(name, weights, train, val, data_record, recipe, steps, args, device, watch):
    """Train one teacher and write its run folder."""
    torch.manual_seed(args.seed)
    classes = data_record["classes"]
    model = models.create_teacher(name, len(classes), args.img_size or data_record["view_size"], args.pretrained, weights)
    fine_tuned = args.pretrained or weights is not None
    backbone_lr, layer_decay = models.fine_tuning_rates(model.backbone)
    groups = models.parameter_groups(model, args.weight_decay, *((args.layer_decay or layer_decay, args.backbone_lr or backbone_lr) if fine_tuned else ()))
    weights_of = class_weights(train.labels, len(classes)).to(device) if args.balance_classes else torch.ones(len(classes), device=device)

    def batches(first_step, steps):
        for indices, passes in batch_plan(len(train), args.batch_size, args.seed, first_step, steps):
            yield render(train.batch(indices, device), indices, 1 + passes, args.seed, recipe), train.labels[indices].to(device)

    def loss(logits, labels):
        # Weights outside the cross-entropy: inside, torch would apply them to the smoothed share of other classes too.
        each = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing, reduction="none")
        return (weights_of[labels] * each).mean()

    record = {"kind": "teacher", "model": name, "classes": classes, "img_size": model.img_size, "data": data_record,
              "view_recipe": recipe.record(), "args": training.plain_args(args)}
    best = training.fit(model, groups, batches, loss, val, steps, Path(args.output) / name, record, args, device, watch)
    print(f"{Path(args.output) / name / 'best.pt'}: val accuracy {best['accuracy']:.3f}, balanced {best['balanced_accuracy']:.3f}, "
          f"NLL {best['nll']:.3f} ({best['n']} pictures)")


if __name__ == "__main__":
    cli.run(main)
