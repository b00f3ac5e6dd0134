"""What a user would pick instead: the same start, teachers, pictures and training seconds.

    pip install lightly-train
    python tests/benchmarks/peers.py --data DIR --weights DIR --student-weights FILE
    python tests/benchmarks/peers.py --table                       # from the CSV alone

Sets, teachers, ensemble and student are those of accuracy.py, in its folder: what it has trained is
not trained again. What build_ensemble.py and distill.py took there is the time that every other way
has for a ResNet18 from the same weights; to be run on the same machine, one core each, beside as
much else:

    fine-tuning   distill.py --alpha 0: labels alone, the same recipe and views
    timm          its LogitDistillationTask with the better teacher online, labelled pictures, our
                  views, optimiser and schedule; alpha and temperature as ours
    LightlyTrain  for half of the time DINOv2 ViT-S is distilled into it on all pictures without
                  labels, at the package's own settings; then it is fine-tuned as above
"""

import os
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accuracy import stages
from bench import (
    append_rows,
    print_table,
    read_rows,
    rounded,
    run_stages,
    select,
    this_commit,
    values_of,
    with_std,
)
from curves import evaluated, mean_scores, student
from sets import TASKS, TEACHERS, TRANSFORMER, add_sources, pictures_of
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import LogitDistillationTask

from common import cli, folders, metrics, models, splits
from common.files import load_json
from common.pictures import DecodedCache
from common.training import Order
from common.views import ViewRecipe, render

BATCH, TRIAL = 24, 20
ALPHA, T = 0.9, 2.0  # of distill.py
SCORES = ("accuracy", "balanced_accuracy", "auroc", "nll")
FIELDS = ("set", "seed", "way", "n", *SCORES, "seconds", "code")
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- timm


class AtItsSize(torch.nn.Module):
    """A teacher's backbone for normalised pictures of any size, as timm's task calls it."""

    def __init__(self, classifier):
        super().__init__()
        self.backbone, self.img_size = classifier.backbone, classifier.img_size
        self.pretrained_cfg = classifier.backbone.pretrained_cfg

    def forward(self, pixels):
        resized = F.interpolate(pixels, size=self.img_size, mode="bilinear", antialias=True)
        return self.backbone(resized)


def timm_online(path, weights, seconds, seed, balanced):
    """(scores, seconds) of a ResNet18 distilled online from the teacher at `path`.

    balanced: draw each class as often; the biases that --balance-classes fits stay as learnt.
    """
    classifier, state = models.load_model(path, CPU)
    cache, recipe = DecodedCache(cli.CACHE), ViewRecipe.from_dict(state["view_recipe"])
    train, _, dataset = splits.open_training(cache, state["dataset"])
    torch.manual_seed(seed)
    network = timm.create_model("resnet18", num_classes=len(dataset["classes"]))
    ours = models.create_student(len(dataset["classes"]), dataset["view_size"], weights=weights)
    body = {name: value for name, value in ours.backbone.state_dict().items() if "fc." not in name}
    network.load_state_dict(body, strict=False)
    network = network.to(memory_format=torch.channels_last)
    order = Order(train.labels, seed, balanced)
    task = LogitDistillationTask(
        network, AtItsSize(classifier), torch.nn.CrossEntropyLoss(), distill_loss_weight=ALPHA,
        task_loss_weight=1 - ALPHA, temperature=T, device=CPU, verbose=False,
    )
    optimizer = create_optimizer_v2(network, "adamw", lr=1e-3, weight_decay=0.05)

    began, step, steps, scheduler = time.perf_counter(), 0, TRIAL, None
    while step < steps:
        indices, passes = order.batch(step, BATCH)
        pixels = render(train.batch(indices), indices, 1 + passes, seed, recipe)
        network.train()
        with models.autocast(CPU):
            loss = task(ours.normalise(pixels), train.labels[indices])["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if scheduler:
            scheduler.step_update(step)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == TRIAL:  # now it is known how many steps the time allows
            steps = round(TRIAL * seconds / (time.perf_counter() - began))
            scheduler = CosineLRScheduler(optimizer, steps, lr_min=1e-6, t_in_epochs=False)
    taken = time.perf_counter() - began
    ours.backbone = network.eval()
    tests = splits.open_tests(cache, folders.test_folders(Path(dataset["dir"])), dataset)
    good = metrics.numbers_of(metrics.good_classes(dataset["classes"]), dataset["classes"])
    answers = [(torch.softmax(models.predict(ours, test, CPU), 1), test.labels)
               for test in tests.values()]
    return mean_scores([metrics.score(*each, good) for each in answers]), taken


# -------------------------------------------------------------------------------- LightlyTrain


def lightly(pictures, home, args, seconds, side):
    """(weights of a ResNet18 that LightlyTrain distilled DINOv2 into, seconds it took)."""
    os.environ["LIGHTLY_TRAIN_MODEL_CACHE_DIR"] = str(home / "lightly_models")
    import lightly_train

    write_dinov2(args.weights / f"{TRANSFORMER}.safetensors", home / "lightly_models")
    sources = [pictures / name for name in ("train", "unlabelled")]
    settings = {
        "data": [str(folder) for folder in sources if folder.is_dir()],
        "method": "distillation",
        "method_args": {"teacher": "dinov2/vits14-noreg"},
        "batch_size": BATCH,
        "num_workers": 0,
        "accelerator": "cpu",
        "precision": "bf16-mixed" if models.precision(CPU) else "32-true",
        "transform_args": {"image_size": (side, side)},
        "overwrite": True,
    }

    def pretrain(out, epochs):
        network = models.create_student(2, [side, side], weights=args.student_weights).backbone
        began = time.perf_counter()
        lightly_train.pretrain(out=str(home / out), model=network, epochs=epochs, **settings)
        return time.perf_counter() - began

    one, two = pretrain("lightly_trial", 1), pretrain("lightly_trial", 2)
    epochs = max(1, round((seconds - one) / (two - one)) + 1)
    taken = pretrain("lightly", epochs)
    return home / "lightly" / "exported_models" / "exported_last.pt", taken


def write_dinov2(source, folder):
    """DINOv2's weights as its authors publish them, from timm's file."""
    from safetensors.torch import load_file

    state = {name: tensor.float() for name, tensor in load_file(source).items()}
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "dinov2_vits14_pretrain.pth")


# ------------------------------------------------------------------------------------- running


def run(name, seed, args):
    """Append the rows of one set and seed that the CSV lacks, each as it is measured."""
    for way, measure in ways(name, seed, args).items():
        if not select(read_rows(args.csv), set=name, seed=str(seed), way=way):
            scores, seconds = measure()
            row = [name, seed, way, scores["n"], *rounded(scores, SCORES), round(seconds)]
            append_rows(args.csv, FIELDS, [[*row, this_commit()]])


def ways(name, seed, args):
    """{way: a function that trains a ResNet18 so and returns (its scores, seconds)}."""
    task, home = TASKS[name], Path(args.output) / name / f"seed_{seed}"
    pictures = pictures_of(task, args.data, home, seed)
    todo = stages(task, pictures, home, args.weights, seed, args.student_weights)
    cached, ours = home / "ensemble", home / "distilled" / "model.pt"
    building = run_stages(todo, home)["ensemble"]
    training = float(read_rows(ours.parent / "log.csv")[-1]["seconds"])
    seconds, per_step = building + training, training / task.steps

    def fine_tuned(way, start, left):
        """The scores of distill.py --alpha 0 from a start, for some seconds."""
        ours_but = Namespace(**{**vars(args), "student_weights": start})
        steps = max(10, round(left / per_step))
        path = student(way, steps, cached, task, home, seed, ours_but, "--alpha", 0,
                       *task.students)
        return evaluated(path, pictures, home)

    def online():
        on_val = load_json(cached / "ensemble.json")["validation"]
        teachers = [path for path in on_val if Path(path).parent.name in TEACHERS]
        better = max(teachers, key=lambda path: on_val[path]["balanced_accuracy"])
        balanced = "--balance-classes" in task.flags
        return timm_online(better, args.student_weights, seconds, seed, balanced)

    def without_labels_first():
        side = max(models.load_model(home / TRANSFORMER / "model.pt", CPU)[0].img_size)
        start, taken = lightly(pictures, home, args, seconds / 2, side)
        return fine_tuned("lightly_tuned", start, seconds - taken), seconds

    return {
        "ours": lambda: (evaluated(ours, pictures, home), seconds),
        "fine-tuning": lambda: (fine_tuned("fine_tuned", args.student_weights, seconds), seconds),
        "timm": online,
        "LightlyTrain": without_labels_first,
    }


def print_results(rows, column, score):
    """A column of every way on every set, over seeds, and the seconds."""
    sets = [name for name in TASKS if select(rows, set=name)]
    lines = []
    for way in values_of(rows, "way"):
        cells = []
        for name in sets:
            chosen = select(rows, set=name, way=way)
            values = [100 * float(row[column]) for row in chosen]
            seconds = [float(row["seconds"]) for row in chosen]
            cells += [with_std(values), f"{np.mean(seconds):.0f}"] if values else ["", ""]
        lines.append([way, *cells])
    head = [text for name in sets for text in (name, "s")]
    print_table([f"{score}, % (std)", *head], lines)
    print()


def main():
    p = cli.parser(__doc__)
    add_sources(p)
    p.add_argument("--sets", nargs="+", choices=TASKS, default=["elpv_100", "elpv_all"])
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[0, 1, 2], metavar="N")
    p.add_argument("--output", default="runs/accuracy", help="folder of accuracy.py")
    p.add_argument("--csv", default=str(Path(__file__).with_suffix(".csv")))
    p.add_argument("--table", action="store_true", help="print the table of the CSV, and end")
    args = p.parse_args()
    for seed in args.seeds if not args.table else ():
        for name in args.sets:
            run(name, seed, args)
    rows = read_rows(args.csv)
    print_results(rows, "balanced_accuracy", "balanced accuracy")
    print_results([row for row in rows if row["auroc"]], "auroc", "AUROC")


if __name__ == "__main__":
    cli.run(main)
