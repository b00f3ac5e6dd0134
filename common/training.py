"""What both trainings call: optimiser, schedule, the next batch, validation, resuming.

The loop itself is in the scripts.
"""

import csv
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from tqdm import tqdm

from common import distributed
from common.files import EXPORTED, UserError, atomic_path, require_same
from common.losses import fit_biases
from common.metrics import score
from common.models import (
    load_checkpoint,
    precision,
    predict,
    save_checkpoint,
    shift_logits,
    starts_warm,
    weights_sha256,
)
from common.validation import groups_of

WARMUP = 0.1  # share of all steps with rising learning rate
CHECK = 20  # steps between looks at whether the loss is finite: a look waits for a GPU
UNEQUAL = 4  # times another class's pictures from which on a line says so
SAVES = 10  # validations and checkpoints per run, evenly spread, the last one at the end
ONLY_TO_RESUME = ("optimizer", "scaler")
WRITTEN = ("last.pt", "model.pt", "log.csv", *EXPORTED)
VERSION = 2  # of what the same flags train; 2: --balance-classes draws, where 1 weighed
# Flags that a resumed run may change: they do not decide what a training computes, or what they
# decide is compared by itself.
FREE_ON_RESUME = {
    "resume", "overwrite", "steps", "device", "workers", "skip_bad", "output", "data_dir",
    "unlabelled", "model", "weights", "pretrained", "good_class", "max_miss_rate",
    "max_false_alarm_rate", "max_int8_drop", "onnx",
}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, linear warm-up, then a cosine down to a thousandth.

    lr: at the peak; clip_grad: largest gradient norm, 0 is off; seed: of the order of the pictures,
    of dropout and the like.
    """

    steps: int
    lr: float
    clip_grad: float
    seed: int


def has_run(folder):
    """Whether a run has left files in a folder."""
    return any((folder / name).is_file() for name in WRITTEN)


def remove_run(folder):
    """Remove what a run has left in a folder."""
    for name in WRITTEN if distributed.rank() == 0 else ():
        (folder / name).unlink(missing_ok=True)


def check_run_folder(folder, resume, overwrite):
    """Raise a UserError for a folder that holds a run already, or a --resume of none."""
    if resume and not has_run(folder):
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to start")
    if has_run(folder) and not (resume or overwrite):
        raise UserError(
            f"{folder}: holds a run already; use --resume, --overwrite or another --output"
        )


class Order:
    """Which pictures a step is trained on: an endless row of passes over them.

    Batches are always full, and any of them can be had at once, so a resumed run needs no stored
    state. Balanced, it is a row of passes over the classes, each of which has a row of its own, so
    that all are seen as often; pictures without a label keep their share.
    """

    def __init__(self, labels, seed, balanced=False):
        """labels: int64 tensor [N], -1 for none."""
        labels, self.seed, self.count = labels.numpy(), seed, len(labels)
        self.classes, self.labelled, self.rest = [], 0, np.arange(self.count)
        if balanced:
            self.classes = [np.flatnonzero(labels == k) for k in np.unique(labels[labels >= 0])]
            self.labelled, self.rest = sum(map(len, self.classes)), np.flatnonzero(labels < 0)

    def batch(self, step, batch_size):
        """(indices, passes), int64 arrays [batch_size]; passes: turns the picture had before."""
        drawn = [self.at(step * batch_size + i) for i in range(batch_size)]
        indices, passes = zip(*drawn)
        return np.array(indices), np.array(passes)

    def at(self, place):
        """(index, pass) of the picture at one place of the row."""
        before = place * self.labelled // self.count  # labelled places before this one
        if (place + 1) * self.labelled // self.count == before:
            return self.draw(self.rest, place - before)
        members, turn = self.draw(self.classes, before)
        return self.draw(members, turn)

    def draw(self, members, place):
        """(member, pass) at one place of an endless row of passes over `members`."""
        number, i = divmod(place, len(members))
        return members[order_of_pass(len(members), number, self.seed)[i]], number


@lru_cache(maxsize=32)
def order_of_pass(count, number, seed):
    """In which order a pass goes over so many pictures: a permutation of range(count)."""
    return np.random.default_rng([seed, number]).permutation(count)


class Run:
    """One training run: everything that changes with a step, and the files it leaves.

    last.pt holds all that resuming needs, model.pt, written once at the end, the weights, and
    log.csv the training curve. A resumed run ends with the same weights on a CPU, since the random
    numbers of every tenth of it begin anew from seed and step.
    """

    def __init__(self, model, groups, schedule, folder, header):
        """model: on its device; groups: AdamW's, timm's lr_scale allowed; header: what checkpoints
        say beside metrics and weights, with `args` and `dataset`."""
        self.model, self.schedule, self.folder, self.header = model, schedule, folder, header
        self.device = next(model.parameters()).device
        self.network = distributed.parallel(model)  # what the loop calls
        self.optimizer = torch.optim.AdamW(
            groups, lr=schedule.lr, fused=self.device.type in ("cuda", "cpu")
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=schedule.steps,
            lr_min=schedule.lr * 1e-3,
            t_in_epochs=False,
            warmup_t=round(WARMUP * schedule.steps),
            warmup_lr_init=schedule.lr * 1e-2,
            warmup_prefix=False,
        )
        half = precision(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.steps_done, self.history, self.losses = 0, [], []

    def __str__(self):
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        dtype = str(precision(self.device) or torch.float32).removeprefix("torch.")
        s, flags = self.schedule, self.header["args"]
        start = "pretrained" if starts_warm(flags) else "from scratch"
        return (
            f"{parameters:.1f} M parameters, {start}, {s.steps} steps, learning rate {s.lr:g}, "
            f"{self.device}, {dtype}, seed {s.seed}"
        )

    def start(self, resume=False):
        """Remove an earlier run's files, or go on after the last validation.

        A finished run needs no last.pt: nothing is left to train, and its model.pt can be exported.
        Raises UserError for a run that is not this one, or that cannot go on.
        """
        if not resume:
            remove_run(self.folder)
            return
        finished = (self.folder / "model.pt").is_file()
        path = self.folder / ("model.pt" if finished else "last.pt")
        if not path.is_file():
            raise UserError(
                f"--resume: {self.folder} has neither last.pt to go on from nor model.pt; "
                "begin anew with --overwrite"
            )
        state = load_checkpoint(path)
        begun = identity(state, state["schedule"])
        if finished:  # learns no more from the ensemble
            begun["ensemble"] = self.header.get("ensemble_sha256")
        require_same(
            begun,
            identity(self.header, asdict(self.schedule)),
            "--resume",
            "resume with the flags, pictures and ensemble that the run began with, "
            "or begin anew with --overwrite",
        )
        self.steps_done, self.history = state["steps"], state["history"]
        if finished:
            print(f"{self.folder}: finished before, so nothing is trained")
            return
        if state.get("version") != VERSION:
            raise UserError(
                f"--resume: {path} is of a version that trained otherwise with the same flags; "
                "begin anew with --overwrite"
            )
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where it was not in use
            self.scaler.load_state_dict(state["scaler"])
        print(f"resuming {self.folder} after step {self.steps_done}")
        if distributed.rank() == 0:  # a kill may have come right after last.pt
            self.write_rest(state)

    def batches(self, pictures, batch_size, balanced=False, stored_views=None):
        """Yield (indices, views, batch) of the steps that are left, the next batch read meanwhile.

        indices, views: int64 arrays [B], this process's share of batch_size; batch: uint8
        [B, H, W, 3] on the device. balanced: see `Order`; stored_views: number of views to go
        through again and again, None for a new one in every pass.
        """
        s, first = self.schedule, self.steps_done
        order = Order(pictures.labels, s.seed, balanced)

        def read(step):
            indices, passes = map(distributed.share, order.batch(step, batch_size))
            views = 1 + (passes % stored_views if stored_views else passes)
            return indices, views, pictures.batch(indices, self.device)

        self.began, self.first_step = time.perf_counter(), first
        self.before = self.history[-1]["seconds"] if self.history else 0.0
        self.begin_tenth()
        hidden = distributed.rank() > 0 or None  # None: only where there is no terminal
        self.bar = tqdm(
            total=s.steps, initial=first, desc=str(self.folder), leave=False, disable=hidden
        )
        with self.bar, ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(read, first) if first < s.steps else None
            for step in range(first, s.steps):
                current = upcoming.result()
                if step + 1 < s.steps:
                    upcoming = reader.submit(read, step + 1)
                yield current

    def begin_tenth(self):
        """Seed what is random in the model, as after a resume."""
        seed = self.schedule.seed * 1_000_003 + self.steps_done
        torch.manual_seed(seed + (distributed.rank() << 53))
        self.model.train()
        self.losses = []

    def step(self, loss):
        """Backward, gradient clipping and optimiser. loss: a scalar tensor."""
        self.scheduler.step_update(self.steps_done)
        self.scaler.scale(loss).backward()
        if self.schedule.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        self.steps_done += 1
        self.bar.update()
        if self.steps_done % CHECK == 0:
            self.require_finite()
        if self.steps_done == self.first_step + CHECK and self.schedule.steps > SAVES * CHECK:
            tqdm.write(f"{self.folder}: {self.time_left()} left")

    def require_finite(self):
        """Raise a UserError that names the first step whose loss is not finite."""
        finite = torch.stack(self.losses).isfinite().tolist()
        if not all(finite):
            step = self.steps_done - len(finite) + finite.index(False) + 1
            lr = self.optimizer.param_groups[-1]["lr"]
            raise UserError(
                f"{self.folder}: the loss of step {step} is not finite (learning rate {lr:.1e}); "
                "try a lower --lr, or --clip-grad 1"
            )

    @property
    def due(self):
        """Whether another tenth of the steps is done."""
        steps = self.schedule.steps
        return (self.steps_done - 1) * SAVES // steps < self.steps_done * SAVES // steps

    def validate(self, val):
        """Ten times a run: score the model on val, log a line, write last.pt, and model.pt last.

        With --balance-classes the last of these fits the biases of the last layer: classes that
        were drawn alike still do not weigh alike where a few pictures of one were learnt by heart.
        val: `Pictures`. Raises UserError when a loss or what the model says of val is not finite.
        """
        self.require_finite()
        loss = float(distributed.mean(torch.stack(self.losses).mean()))
        if distributed.rank() == 0:
            logits = predict(self.model.eval(), val, self.device)
            if not logits.isfinite().all():
                raise UserError(
                    f"{self.folder}: after step {self.steps_done} the model's logits are not "
                    "finite; try a lower --lr"
                )
            if self.steps_done == self.schedule.steps and self.header["args"]["balance_classes"]:
                self.fit_biases(logits, val)
                logits = predict(self.model, val, self.device)
            metrics = score(torch.softmax(logits, dim=1), val.labels)
            self.log(loss, metrics)
            self.write(metrics)
        distributed.barrier()
        self.begin_tenth()

    def fit_biases(self, logits, val):
        """Make classes weigh alike. logits: float32 [N, K], what the model says of val."""
        parts = groups_of(val, self.header["dataset"]["group_regex"])
        by = fit_biases(logits, val.labels, parts)
        shift_logits(self.model, by)
        moved = ", ".join(f"{name} {b:+.2f}" for name, b in zip(self.header["classes"], by))
        tqdm.write(f"{self.folder}: biases fitted on validation: {moved}")

    def log(self, loss, metrics):
        """Add a row to the training curve and print it, with the time that is left."""
        seconds, steps = time.perf_counter() - self.began, self.schedule.steps
        row = {
            "steps": self.steps_done,
            "lr": self.optimizer.param_groups[-1]["lr"],
            "loss": loss,
            "val_accuracy": metrics["accuracy"],
            "val_balanced_accuracy": metrics["balanced_accuracy"],
            "val_nll": metrics["nll"],
            "seconds": round(self.before + seconds, 1),
        }
        self.history.append(row)
        tqdm.write(
            f"{self.folder} step {self.steps_done}/{steps}: loss {loss:.3f}, "
            f"val accuracy {row['val_accuracy']:.3f}, balanced {row['val_balanced_accuracy']:.3f}, "
            f"NLL {row['val_nll']:.3f}, lr {row['lr']:.1e}, {self.time_left()} left"
        )

    def time_left(self):
        """How long the steps to come take if they go on like those done, in words."""
        seconds = time.perf_counter() - self.began
        left = seconds / (self.steps_done - self.first_step)
        left *= self.schedule.steps - self.steps_done
        return f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"

    def write(self, metrics):
        """Write last.pt, and what `write_rest` adds to it."""
        weights = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        state = {
            **self.header,
            "version": VERSION,
            "schedule": asdict(self.schedule),
            "steps": self.steps_done,
            "metrics": metrics,
            "history": self.history,
            "weights_sha256": weights_sha256(weights),
            "state_dict": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(state, self.folder / "last.pt")
        self.write_rest(state)

    def write_rest(self, state):
        """Write log.csv, and model.pt when all steps are done. state: of last.pt."""
        with atomic_path(self.folder / "log.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.history[0])
                writer.writeheader()
                writer.writerows(self.history)
        if state["steps"] == self.schedule.steps:
            model = {key: state[key] for key in state if key not in ONLY_TO_RESUME}
            save_checkpoint(model, self.folder / "model.pt")


def say_rare(labels, classes):
    """Print what helps a class with few of the training pictures. labels: int64 tensor [N]."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    fewest, most = min(counts), max(counts)
    if most >= UNEQUAL * fewest:
        print(
            f"of {classes[counts.index(fewest)]} there are {fewest} training pictures, of "
            f"{classes[counts.index(most)]} {most}; --balance-classes, in every training, draws "
            "all classes as often"
        )


def identity(header, schedule):
    """What a resumed run must find as it was, as plain data.

    A switch that is off is left out, since an earlier version may not have had it.
    """
    args = header["args"]
    decisive = {flag: value for flag, value in args.items() if flag not in FREE_ON_RESUME}
    return {
        **{flag: value for flag, value in decisive.items() if value is not False},
        **schedule,
        "pictures": header["dataset"]["fingerprint"],
        "held_out": header["dataset"]["held_out"],
        "dropped": header["dataset"]["dropped"],
        "ensemble": header.get("ensemble_sha256"),
        "pretrained": starts_warm(args),
    }
