"""What both trainings share: optimiser, schedule, averaged weights, checkpoints, choice of epoch.

The loop itself is in the scripts:

    run = Run(model, groups, schedule, folder, record)
    run.start(resume=False)
    for _ in run.epochs():
        plan = run.batches(len(pictures), batch_size)
        for indices, passes, batch in pictures.ahead(plan, device):
            loss = ...                  # of run.network(pixels)
            run.step(loss)              # backward, clip, optimiser, schedule, averaged weights
        run.finish_epoch(val)           # ten times a run: validate; best.pt, last.pt, log.csv
"""

import csv
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from tqdm import tqdm

from common import distributed
from common.checkpoints import load, save, weights_sha256
from common.errors import UserError, require_same
from common.files import EXPORTED, atomic_path
from common.metrics import balanced_number, good_enough, score
from common.models import precision, predict
from common.views import batch_plan

WARMUP = 0.1  # share of all steps with rising learning rate
CHECK = 20  # steps between looks at whether the loss is finite: a look waits for a GPU
SAVES = 10  # validations and checkpoints per run, evenly spread, the last one at the end
WRITTEN = ("last.pt", "best.pt", "log.csv", *EXPORTED)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, linear warm-up, then a cosine down to a thousandth.

    lr: at the peak; ema_decay: per step, of the averaged weights, 0 is off; clip_grad: largest
    gradient norm, 0 is off; seed: of the order, of dropout and the like.
    """

    epochs: int
    steps_per_epoch: int
    lr: float
    ema_decay: float
    clip_grad: float
    seed: int

    @property
    def steps(self):
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def epochs_for(steps, steps_per_epoch):
    """Passes that make at least so many steps: few pictures need more passes than many do."""
    return -(-steps // steps_per_epoch)


def has_run(folder):
    """Whether a run has left files in a folder; one that died early has no last.pt yet."""
    return any((Path(folder) / name).is_file() for name in WRITTEN)


def check_run_folder(folder, resume, overwrite):
    """Raise a UserError for a folder that holds a run already, or a --resume of none."""
    written = has_run(folder)
    if resume and not written:
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to start")
    if written and not (resume or overwrite):
        raise UserError(
            f"{folder}: holds a run already; use --resume, --overwrite or another --output"
        )


class Run:
    """One training run: everything that changes with a step, and the files it leaves.

    best.pt holds the averaged weights of the validation that `good_enough` chooses, last.pt all
    that resuming needs, log.csv the training curve. Every epoch seeds itself from seed and epoch
    number, so a resumed run ends with the same weights on a CPU.
    """

    def __init__(self, model, groups, schedule, folder, record):
        """model: on its device; groups: AdamW parameter groups, timm's lr_scale allowed;
        record: what the checkpoints say beside metrics and weights, with `args` and `data`."""
        self.model, self.schedule, self.folder, self.record = model, schedule, Path(folder), record
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
        self.ema = ModelEmaV3(model, decay=schedule.ema_decay, use_warmup=True)
        self.epoch, self.steps_done, self.best, self.history = 0, 0, None, []

    def __str__(self):
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        dtype = str(precision(self.device) or torch.float32).removeprefix("torch.")
        s = self.schedule
        return (
            f"{parameters:.1f} M parameters, {s.steps} steps in {s.epochs} epochs, "
            f"learning rate {s.lr:g}, {self.device}, {dtype}, seed {s.seed}"
        )

    def start(self, resume=False, may_differ=()):
        """Remove an earlier run's files, or go on after the last epoch that was saved.

        may_differ: names of flags that a resumed run need not repeat. Raises UserError for last.pt
        of another run.
        """
        if not (resume and (self.folder / "last.pt").is_file()):
            if distributed.rank() == 0:
                for name in WRITTEN:
                    (self.folder / name).unlink(missing_ok=True)
            return
        state = load(self.folder / "last.pt")
        remedy = "resume with the flags the run began with"
        same = [key for key in {**state["args"], **self.record["args"]} if key not in may_differ]
        require_same(
            {key: state["args"].get(key) for key in same},
            {key: self.record["args"].get(key) for key in same},
            "--resume",
            remedy,
        )
        require_same(state["schedule"], asdict(self.schedule), "--resume", remedy)
        require_same(made_from(state), made_from(self.record), "--resume",
                     "the pictures changed or the ensemble was built anew; use --overwrite")
        self.ema.module.load_state_dict(state["state_dict"])
        self.model.load_state_dict(state["raw_state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where it was not in use
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        self.steps_done = self.epoch * self.schedule.steps_per_epoch
        if distributed.rank() == 0:  # a kill may have come between last.pt and log.csv
            write_log(self.folder / "log.csv", self.history)
        print(f"resuming {self.folder} after epoch {self.epoch}")

    def epochs(self):
        """Yield the epochs that are left, the model in training mode, under a progress bar."""
        s, first = self.schedule, self.epoch
        self.began, self.first_epoch = time.perf_counter(), first
        self.bar = tqdm(
            total=s.steps, initial=self.steps_done, desc=str(self.folder), leave=False,
            disable=distributed.rank() > 0 or None,
        )
        with self.bar:
            for epoch in range(first + 1, s.epochs + 1):
                self.epoch = epoch
                self.losses = torch.zeros((), device=self.device)
                self.bad_steps = torch.zeros((), dtype=torch.int64, device=self.device)
                torch.manual_seed(s.seed * 1_000_003 + epoch + (distributed.rank() << 40))
                self.model.train()
                yield epoch

    def batches(self, count, batch_size):
        """(indices, passes) of each step of this epoch, see `views.batch_plan`.

        batch_size: of all processes together; each gets its share.
        """
        s = self.schedule
        plan = batch_plan(count, batch_size, s.seed, self.steps_done, s.steps_per_epoch)
        for indices, passes in plan:
            yield distributed.share(indices), distributed.share(passes)

    def step(self, loss):
        """Backward, gradient clipping, optimiser, and averaged weights. loss: a scalar tensor."""
        self.scheduler.step_update(self.steps_done)
        self.scaler.scale(loss).backward()
        if self.schedule.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, step=self.steps_done)
        self.losses += loss.detach()
        self.bad_steps += ~self.losses.isfinite()  # once it is not, the sum never is again
        self.steps_done += 1
        if self.steps_done % CHECK == 0:
            self.require_finite()
        if not self.bar.disable and self.steps_done % 10 == 0:  # looking at a loss waits for a GPU
            self.bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
        self.bar.update()

    def require_finite(self):
        """Raise a UserError that names the first step of this epoch whose loss is not finite."""
        bad = int(self.bad_steps)
        if bad:
            step, lr = self.steps_done - bad + 1, self.optimizer.param_groups[-1]["lr"]
            raise UserError(
                f"{self.folder}: the loss of step {step} is not finite (learning rate {lr:.1e}); "
                "try a lower --lr, or --clip-grad 1"
            )

    def finish_epoch(self, val):
        """Ten times a run: score the averaged weights on val, log a line, write the checkpoints.

        val: the `Pictures` that choose the epoch. Raises UserError when a loss of the epoch or what
        the model says of val is not finite.
        """
        self.require_finite()
        loss = float(distributed.mean(self.losses)) / self.schedule.steps_per_epoch
        epochs = self.schedule.epochs
        if self.epoch * SAVES // epochs == (self.epoch - 1) * SAVES // epochs:
            return
        if distributed.rank() == 0:
            logits = predict(self.ema.module, val, self.device)
            if not logits.isfinite().all():
                raise UserError(
                    f"{self.folder}: after step {self.steps_done} the model's logits are not "
                    "finite; try a lower --lr"
                )
            metrics = score(torch.softmax(logits, dim=1), val.labels)
            self.log(loss, metrics)
            self.write(metrics, balanced_number(val.labels))
        distributed.barrier()

    def log(self, loss, metrics):
        """Add a row to the training curve and print it, with the time that is left."""
        seconds = time.perf_counter() - self.began
        row = {
            "epoch": self.epoch,
            "steps": self.steps_done,
            "lr": self.optimizer.param_groups[-1]["lr"],
            "loss": loss,
            "val_accuracy": metrics["accuracy"],
            "val_balanced_accuracy": metrics["balanced_accuracy"],
            "val_nll": metrics["nll"],
            "seconds": round(seconds, 1),
        }
        self.history.append(row)
        per_epoch = seconds / (self.epoch - self.first_epoch)
        left = per_epoch * (self.schedule.epochs - self.epoch)
        tqdm.write(
            f"{self.folder} epoch {self.epoch}/{self.schedule.epochs}: loss {loss:.3f}, "
            f"val accuracy {row['val_accuracy']:.3f}, balanced {row['val_balanced_accuracy']:.3f}, "
            f"NLL {row['val_nll']:.3f}, lr {row['lr']:.1e}, {left:.0f} s left"
        )

    def write(self, metrics, n):
        """Write best.pt where this validation is good enough, last.pt and log.csv in any case."""
        averaged = {k: v.detach().cpu() for k, v in self.ema.module.state_dict().items()}
        state = {
            **self.record,
            "schedule": asdict(self.schedule),
            "epoch": self.epoch,
            "metrics": metrics,
            "history": self.history,
            "weights_sha256": weights_sha256(averaged),
            "state_dict": averaged,
        }
        if good_enough([row["val_balanced_accuracy"] for row in self.history], n):
            self.best = metrics
            save(state, self.folder / "best.pt")
        rest = {
            "best": self.best,
            "raw_state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save({**state, **rest}, self.folder / "last.pt")
        write_log(self.folder / "log.csv", self.history)


def made_from(record):
    """What a resumed run must find as it was: pictures, soft targets, whether it starts warm."""
    args = record["args"]
    return {
        "data": record["data"]["fingerprint"],
        "dropped": record["data"]["dropped"],
        "ensemble": record.get("ensemble_sha256"),
        "pretrained": bool(args.get("weights") or args.get("pretrained")),
    }


def write_log(path, history):
    """Write the training curve as CSV, a row per validation."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
