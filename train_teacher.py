"""Stage 1: fine-tune one or several timm classifiers on a folder of pictures.

    python train_teacher.py                                # the embedded set, two default teachers
    python train_teacher.py --steps 50 --model resnet10t   # seconds on a laptop
    python train_teacher.py --data-dir my_parts --pretrained \\
        --model vit_small_patch14_dinov2 tf_efficientnet_lite0
    torchrun --standalone --nproc-per-node 4 train_teacher.py -b 96  # a process per GPU

Reads   DIR/train/<class>/*, and DIR/val/<class>/* where it exists (else part of train is held out)
Writes  runs/<model>/model.pt  the weights, once all steps are done
        runs/<model>/last.pt   all that --resume needs
        runs/<model>/log.csv   the training curve
Next    build_ensemble.py
"""

import argparse
import difflib
import re
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from common import cli, distributed, folders, models, splits, training, validation
from common.files import UserError, px, some_of
from common.pictures import WHITE_LEVEL, list_pictures
from common.views import ViewRecipe, render
from infer import FORMATS, decode

# Passes over the labels, fewest and most steps: with more a teacher learns its labels by heart, and
# teaches so. A pretrained transformer learns faster (tests/benchmarks/README.md, ablations).
LENGTH, OF_TRANSFORMERS = (60, 500, 2000), (24, 200, 500)
LABEL_SMOOTHING = 0.1  # share of the label spread over all classes
LR, EMBEDDED_LR = 1e-3, 3e-3  # the embedded set's few steps from scratch want a higher one
EMBEDDED_STEPS = {"coatnet_nano_rw_224": 235, "resnet10t": 500}  # a few minutes
EMBEDDED_SIZE = 64  # px; its defects are large, so that its chain takes minutes on two cores
VAL_FRACTION = 0.2
AREA, MULTIPLE, SMALLEST, LARGEST = 128**2, 16, 32, 4096  # px of the default view size
OTHER_SHAPE = 1.5  # factor between proportions from which on a line says so
SLOWEST = 0.75**13  # timm's scale of the learning rate of the first layers of a ViT of 12 blocks
STRIDE = 32  # px of a picture for one of a network's last features
LOST = 3  # px in a view below which nothing is seen of a defect: a rule of thumb


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("--data-dir", default=folders.EMBEDDED,
                   help="folder with train/ and optionally val/, test*/ and unlabelled/ (default: "
                   "%(default)s, drawn on first use)")
    p.add_argument("--model", nargs="+", action=cli.Once, default=list(EMBEDDED_STEPS),
                   metavar="NAME",
                   help="timm classifiers, trained one after the other "
                   f"(default: {' '.join(EMBEDDED_STEPS)})")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true",
                       help="start from timm's weights (needs a network once)")
    start.add_argument("--weights", nargs="+", action="extend", metavar="FILE",
                       help="start from weight files in timm's names or model.pt, one per --model")
    p.add_argument("--steps", type=cli.positive_int, nargs="+", action="extend",
                   metavar="N",
                   help="batches to train on, one number for all models or one for each "
                   f"(default: {LENGTH[0]} passes over the labels, at least {LENGTH[1]} and at "
                   f"most {LENGTH[2]}; of a pretrained transformer {OF_TRANSFORMERS[0]}, at least "
                   f"{OF_TRANSFORMERS[1]} and at most {OF_TRANSFORMERS[2]}; fewer for the embedded "
                   "set from scratch); at 128 px one takes 0.5 s (EfficientNet-Lite0) to "
                   "1.4 s (DINOv2 ViT-S) on two CPU cores")
    p.add_argument("--seed", type=cli.seed, default=0,
                   help="of initialisation, order and views (default: %(default)s)")
    p.add_argument("--output", default="runs",
                   help="folder for the run folders (default: %(default)s)")

    g = p.add_argument_group("pictures and views")
    g.add_argument("--view-size", type=cli.picture_size, metavar="HxW",
                   help="height x width in px at which pictures are stored and views are made, or "
                   "the side of a square (default: the pictures' median shape, in whole steps of "
                   "16, with as many pixels as 128x128 or as they have; 64 for the embedded set)")
    g.add_argument("--img-size", type=cli.picture_size, metavar="HxW",
                   help="px the models see, raised to whole patches (default: the view size, or "
                   "what is like it for a model that does not take it)")
    g.add_argument("--view-recipe", nargs="+", action="extend", default=[], metavar="NAME=NUMBER",
                   help="change the augmentation, as in rotate=10 flip=0 (see common/views.py)")
    g.add_argument("--val-fraction", type=cli.open_fraction,
                   help="share of train/ held out where there is no val/ "
                   f"(default: {VAL_FRACTION})")
    g.add_argument("--group-regex", type=regex,
                   help="pictures whose path gives the same first match group show one part, and "
                   "stay on one side; train/ may not share parts with val/ and test*/")
    g.add_argument("--white-level", type=cli.positive_int, default=WHITE_LEVEL,
                   help="value that is white where pictures have more than 8 bits; 4095 for a "
                   "12-bit camera, 1 for fractions (default: %(default)s)")
    cli.add_leak_flags(g)
    rates = (f"learning rate of new layers (default: {LR:g}; {EMBEDDED_LR:g} for the embedded set "
             "from scratch)")
    cli.add_training_flags(p, None, rates)
    cli.add_common_flags(p)
    return p.parse_args()


@distributed.processes()
def main():
    args = parse_arguments()
    recipe = cli.recipe(ViewRecipe().changed, args.view_recipe, "--view-recipe")
    check_models(args.model, args.weights, args.steps)
    distributed.check_batch(args.batch_size)
    homes = [Path(args.output) / name for name in args.model]

    with ExitStack() as held:
        for home in homes:
            held.enter_context(distributed.hold(home))

        # A run is never overwritten unasked. An interruption leaves teachers that had not begun.
        begun = [home for home in homes if training.has_run(home)]
        resumed = [args.resume and (home in begun or not begun) for home in homes]
        for home, resume in zip(homes, resumed):
            training.check_run_folder(home, resume, args.overwrite)
        for file, resume in zip(args.weights or [], resumed):
            if not (resume or Path(file).is_file()):
                raise UserError(f"--weights {file}: no such file")

        device = cli.pick_device(args.device)
        with distributed.first_then_others():
            folder = folders.data_folder(args.data_dir)
            view_size = args.view_size or default_view_size(folder)
            img_sizes = [choose_img_size(name, view_size, args.img_size) for name in args.model]
            train, val, dataset = open_pictures(folder, view_size, args)
        with distributed.first_then_others():
            try_starts(dataset, img_sizes, resumed, args)
        cli.lap("pictures")
        for number, name in enumerate(args.model):
            with distributed.first_then_others():
                model, groups = create(number, dataset, img_sizes[number], resumed[number], args)
            models.on_device(model, device)
            schedule = plan(number, model, len(train), dataset, args)
            run = training.Run(model, groups, schedule, homes[number], {
                "kind": "teacher",
                "model": name,
                "classes": dataset["classes"],
                "img_size": model.img_size,
                "dataset": dataset,
                "view_recipe": recipe.as_dict(),
                "args": vars(args),
            })
            run.start(resumed[number])
            if args.weights and not resumed[number]:
                say_of_what_they_learnt(args.weights[number], dataset)
            for home, resume in list(zip(homes, resumed))[number + 1:]:
                if not resume:  # else --resume would take an old run for a finished one
                    training.remove_run(home)
            print(f"{name} at {px(model.img_size)}: {len(train)} pictures, {run}")
            fit(run, train, val, recipe, args)
            cli.lap("training")
    cli.print_laps()


def regex(text):
    """argparse type: a regular expression with at least one group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    if not groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no (group) to name the part by")
    return text


def check_models(names, weights, steps):
    """Refuse names, weight files and numbers of steps that do not fit together."""
    if weights and len(weights) != len(names):
        raise UserError(f"--weights names {len(weights)} files for {len(names)} models; give one "
                        "for each")
    if steps and len(steps) not in (1, len(names)):
        raise UserError(f"--steps names {len(steps)} numbers for {len(names)} models; give one for "
                        "all or one for each")
    if len(set(names)) < len(names):
        raise UserError("--model: each name once; two runs of one model need two --output folders")
    for name in names:
        check_name(name)


def check_name(name):
    """Raise UserError, with near names, when timm knows no such architecture."""
    known = timm.list_models() + timm.list_pretrained()
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UserError(f"--model {name}: timm has no such model{hint}")


def choose_img_size(name, view_size, asked):
    """[H, W] that a model sees: what is asked for, or what it takes that is like the view size.

    Where the model has windows or halves its maps evenly, that is in whole steps of STRIDE; where
    it has a place for each patch of a square, it is a square of about as many pixels; else its own.
    """
    if asked:
        return models.size_that_fits(name, [asked])
    whole = [-(-side // STRIDE) * STRIDE for side in view_size]
    side = STRIDE * max(1, round(np.prod(view_size) ** 0.5 / STRIDE))
    sizes = [view_size, whole, [side, side], models.own_size(name)]
    size = models.size_that_fits(name, sizes)
    if size != view_size:
        print(f"{name} does not take {px(view_size)}: it sees the views at {px(size)}")
    return size


def open_pictures(folder, view_size, args):
    """(train, val, dataset); refuses test pictures among the training ones, or drops them.

    With --drop-leaks training pictures that a val/ nearly repeats go too.
    """
    cache = cli.decoded_cache(args)
    wanted = {
        "dir": folder.as_posix(),
        "view_size": view_size,
        "white_level": args.white_level,
        "val_fraction": args.val_fraction or VAL_FRACTION,
        "group_regex": args.group_regex,
        "dropped": [],
    }
    train, val, dataset = splits.open_training(cache, wanted)
    tests, leaks = splits.open_to_compare(cache, dataset), (args.drop_leaks, args.allow_leakage)
    dropped = splits.leaked_paths(train + val, tests, "training or validation", "test", *leaks)
    parts = [(train + val, tests)]
    if not dataset["held_out"]:  # there is a val/
        if args.val_fraction:
            print("--val-fraction is not used, since there is a val/")
        parts.append((train, [val]))
        in_detail = splits.in_detail(cache, dataset, train, val)
        dropped += validation.repeated(cache.home, *in_detail, "training", args.drop_leaks)
    dropped += splits.paths_of_split_parts(parts, args.group_regex, *leaks)
    if dropped:
        dropped = list(dict.fromkeys(dropped))
        train, val, dataset = splits.open_training(cache, {**wanted, "dropped": dropped})
    print(
        f"{folder}: {len(train)} training and {len(val)} validation pictures at "
        f"{px(view_size)}, classes {', '.join(dataset['classes'])}"
    )
    if not folders.test_folders(folder):
        print(f"{folder}: has no test* folder; evaluate.py wants pictures that were in no training")
    for line in size_lines((train + val).sizes(), view_size):
        print(line)
    if not args.balance_classes:
        training.say_rare(train.labels, dataset["classes"])
    return train, val, dataset


def default_view_size(folder):
    """[H, W] of the median training picture, reduced to the pixels of 128 x 128, in steps of 16.

    128 px with fewer steps beats 70 px with more in the same time (tests/benchmarks/ablations.py),
    and a student's steps take minutes on two CPU cores. Small defects need more.
    """
    if folders.is_embedded(folder):
        return [EMBEDDED_SIZE, EMBEDDED_SIZE]
    train, sizes = folders.train_folder(folder), []
    paths = list_pictures(train)
    for path in paths[:: max(1, len(paths) // 100)]:
        with suppress(Exception), Image.open(train / path, formats=FORMATS) as image:
            if image.format == "TIFF":  # of pages, some of them thumbnails, that Pillow turns
                sizes.append(decode((train / path).read_bytes())[0].shape[:2])
                continue
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # by a quarter
            sizes.append(image.size if turned else image.size[::-1])
    # What cannot be read is listed when all are decoded.
    size = np.median(sizes or [(128, 128)], axis=0)
    share = min(1, (AREA / size.prod()) ** 0.5)
    steps = np.round(share * size / MULTIPLE) if share < 1 else size // MULTIPLE
    return (MULTIPLE * steps).clip(SMALLEST, LARGEST).astype(int).tolist()


def size_lines(sizes, view_size):
    """What the views keep of the pictures, in words. sizes: (width, height, ...) of each."""
    height, width = view_size
    theirs = np.array([row[:2] for row in sizes])
    median = np.median(theirs, axis=0)
    pictures, reduced = "pictures of {:.0f} x {:.0f} px (median)".format(*median), "are not reduced"
    factor = max(median / (width, height))
    if factor > 1:
        larger = [max(side, int(min(2 * side, own))) for side, own in zip(view_size, median[::-1])]
        reduced = (
            f"are reduced to {width} x {height}: a defect under {np.ceil(LOST * factor):.0f} px "
            f"is then under {LOST}, and lost; --view-size {larger[0]}x{larger[1]} keeps more, and "
            "takes longer"
        )
    yield f"{pictures} {reduced}"
    stretch = theirs[:, 0] / theirs[:, 1] * height / width
    squeezed = int((np.maximum(stretch, 1 / stretch) > OTHER_SHAPE).sum())
    if squeezed:
        yield (
            f"{squeezed} of {len(theirs)} pictures have another shape than the views, by a factor "
            f"of more than {OTHER_SHAPE}, and are squeezed"
        )


def say_of_what_they_learnt(weights, dataset):
    """A line where weights are of a model.pt that learnt from other pictures than this training.

    What validates now may be among them, since what is held out is drawn anew.
    """
    with suppress(UserError):
        theirs = models.read_header(weights)["dataset"]
        if any(theirs[key] != dataset[key] for key in ("fingerprint", "held_out", "dropped")):
            print(f"warning: {weights} learnt from other pictures, or others than these were held "
                  f"out then ({theirs['dir']}); where it has seen what validates or tests now, "
                  "that praises it")


def try_starts(dataset, img_sizes, resumed, args):
    """Refuse weights of the models to come that cannot be had, before the first is trained."""
    for number in range(1, len(args.model)) if models.starts_warm(vars(args)) else ():
        if not resumed[number]:
            weights = args.weights[number] if args.weights else None
            models.create_teacher(args.model[number], len(dataset["classes"]), img_sizes[number],
                                  args.pretrained, weights)


def create(number, dataset, img_size, resume, args):
    """(model, parameter groups); a pretrained backbone learns more slowly than its new head."""
    torch.manual_seed(args.seed)
    weights = args.weights[number] if args.weights and not resume else None
    pretrained = args.pretrained and not resume
    name, classes = args.model[number], len(dataset["classes"])
    model = models.create_teacher(name, classes, img_size, pretrained, weights)
    if not models.starts_warm(vars(args)):
        return model, parameter_groups(model, args.weight_decay)
    others = models.normalised_otherwise(name) if weights else []
    if others:
        print(f"{name}: normalises pictures as its own weights want them; those of "
              f"{some_of(others)} want others, and to be named so: --model {others[0]}")
    backbone_lr, layer_decay = fine_tuning_rates(model.backbone)
    return model, parameter_groups(model, args.weight_decay, layer_decay, backbone_lr)


def plan(number, model, pictures, dataset, args):
    """The schedule of one teacher, for that many labelled pictures."""
    name, lr, warm = args.model[number], LR, models.starts_warm(vars(args))
    length = OF_TRANSFORMERS if warm and attends(model.backbone) else LENGTH
    steps = default_steps(pictures, args.batch_size, *length)
    if folders.is_embedded(dataset["dir"]) and not warm:
        steps, lr = EMBEDDED_STEPS.get(name, steps), EMBEDDED_LR
    if args.steps:
        steps = args.steps[number % len(args.steps)]
    return training.Schedule(steps, args.lr or lr, args.clip_grad, args.seed)


def default_steps(pictures, batch_size, passes, fewest, most):
    """The steps of so many passes over the pictures, or the bound that they exceed."""
    return min(max(fewest, passes * pictures // batch_size), most)


def fit(run, train, val, recipe, args):
    """Train one teacher: cross-entropy with label smoothing on fresh views in every pass."""
    device = run.device
    for indices, views, batch in run.batches(train, args.batch_size, args.balance_classes):
        pixels = render(batch, indices, views, args.seed, recipe)
        labels = train.labels[indices].to(device, non_blocking=True)
        with models.autocast(device):
            logits = run.network(pixels)
        run.step(F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING))
        if run.due:
            run.validate(val)


def parameter_groups(model, weight_decay, layer_decay=None, backbone_lr=None):
    """AdamW groups with timm's `lr_scale`, which its schedulers multiply the learning rate by.

    From scratch (layer_decay None) all layers share one rate. For a pretrained backbone the last
    block gets backbone_lr, each earlier one layer_decay times the next (ELECTRA, Clark et al.
    2020), and the new head 1. Biases and norms have no weight decay.
    """
    backbone = model.backbone
    skip = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    if layer_decay is None:
        return param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=skip)
    head = {id(p) for each in models.heads(backbone) for p in each.parameters()}
    groups = param_groups_layer_decay(
        backbone, weight_decay, no_weight_decay_list=skip, layer_decay=layer_decay,
        min_scale=SLOWEST,
    )
    split = []
    for group in groups:
        scale = min(1.0, group["lr_scale"] / layer_decay) * backbone_lr
        body = [p for p in group["params"] if id(p) not in head]
        new = [p for p in group["params"] if id(p) in head]
        split.append({**group, "params": body, "lr_scale": scale})
        split.append({**group, "params": new, "lr_scale": 1.0})
    return [group for group in split if group["params"]]


def fine_tuning_rates(backbone):
    """(backbone_lr, layer_decay) for `parameter_groups`: steep for transformers, flat for CNNs.

    A CNN has more blocks, so a transformer's decay would freeze its early ones; those of deeper
    transformers, and of CNNs that attend, learn as fast as the first of 12 blocks (SLOWEST).
    """
    return (0.1, 0.75) if attends(backbone) else (1.0, 0.95)


def attends(backbone):
    """Whether a timm model is a transformer, or a CNN with attention.

    What attends has heads; its name says nothing, since timm calls the slot of squeeze-and-excite
    `attn` too.
    """
    return any(hasattr(m, "num_heads") or hasattr(m, "heads") for m in backbone.modules())


if __name__ == "__main__":
    cli.run(main)
