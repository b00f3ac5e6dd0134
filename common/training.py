"""The training loop that teachers and student share."""

import csv
import time
from pathlib import Path

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from tqdm import tqdm

from common.checkpoints import atomic_path, load, require_same, save, weights_sha256
from common.cli import UserError
from common.losses import mixture
from common.metrics import score
from common.models import autocast, predict

SAVES = 10  # validations and checkpoints per run, evenly spread, the last one at the end
FREE_TO_CHANGE = {"resume", "overwrite", "device", "workers", "cache_dir", "output", "data_dir", "unlabelled", "model", "weights",
                  "good_class", "max_miss_rate", "max_false_alarm_rate", "max_int8_drop", "bfloat16", "calibration_pictures"}  # the last six: export


def default_epochs(steps, steps_per_epoch):
    """Passes that make at least so many steps: few pictures need more passes than many do."""
    return -(-steps // steps_per_epoch)


def check_run_folder(folder, args):
    """Refuse a folder that holds a run already, or a --resume of none; called before any long work."""
    last = Path(folder) / "last.pt"
    if args.resume and not last.is_file():
        raise UserError(f"--resume: {last} does not exist; leave --resume out to start")
    if last.is_file() and not (args.resume or args.overwrite):
        raise UserError(f"{folder}: holds a run already; use --resume, --overwrite or another --output")


def fit(model, groups, batches, loss, val, steps_per_epoch, folder, record, args, device, watch):
    """Train with AdamW, warm-up and cosine decay per step, gradient clipping and averaged weights.

    groups: AdamW parameter groups (timm's lr_scale allowed); batches(first_step, steps): iterator of
    (pixels float32 [B, 3, S, S] in [0, 255], anything) on the device; loss(logits, anything): scalar;
    val: Pictures that choose the epoch; record: what the checkpoints say beside metrics and weights;
    args: epochs, lr, warmup, ema_decay, clip_grad, seed and resume are read; watch: a Stopwatch.

    Writes folder/last.pt (all that --resume needs), folder/best.pt (the averaged weights of the
    validation that `good_enough` chooses) and folder/log.csv, ten times per run. Every epoch seeds
    itself from seed and epoch number, so a resumed run ends with the same weights on a CPU. Returns
    the chosen validation's metrics. Raises FloatingPointError when the loss is not finite.
    """
    folder, total = Path(folder), args.epochs * steps_per_epoch
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type in ("cuda", "cpu"))
    schedule = CosineLRScheduler(optimizer, t_initial=total, lr_min=args.lr * 1e-3, t_in_epochs=False,
                                 warmup_t=round(args.warmup * total), warmup_lr_init=args.lr * 1e-2, warmup_prefix=False)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True)
    first_epoch, best, history = 0, None, []
    if args.resume and (folder / "last.pt").is_file():
        state = load(folder / "last.pt")
        require_same(_comparable(state["args"]), _comparable(record["args"]), "--resume", "resume with the flags the run began with")
        require_same({"data": state["data"]["fingerprint"]}, {"data": record["data"]["fingerprint"]}, "--resume", "the pictures changed")
        require_same({"ensemble": state.get("ensemble_sha256")}, {"ensemble": record.get("ensemble_sha256")}, "--resume", "the ensemble was built anew")
        ema.module.load_state_dict(state["state_dict"])
        model.load_state_dict(state["raw_state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first_epoch, best, history = state["epoch"], state["best"], state["history"]
        print(f"resuming {folder} after epoch {first_epoch}")
    else:
        for name in ("last.pt", "best.pt", "log.csv", "student.ts", "student.bf16.ts", "student.int8.ts"):
            (folder / name).unlink(missing_ok=True)

    start = time.perf_counter()
    with tqdm(total=total, initial=first_epoch * steps_per_epoch, desc=str(folder), disable=None, leave=False) as bar:
        for epoch in range(first_epoch + 1, args.epochs + 1):
            first_step = (epoch - 1) * steps_per_epoch
            torch.manual_seed(args.seed * 1_000_003 + epoch)
            model.train()
            losses = torch.zeros((), device=device)
            stream = iter(batches(first_step, steps_per_epoch))
            for step in range(first_step, first_step + steps_per_epoch):
                with watch("views"):
                    pixels, target = next(stream)
                with watch("training"):
                    schedule.step_update(step)
                    with autocast(device):
                        logits = model(pixels)
                    value = loss(logits.float(), target)
                    scaler.scale(value).backward()
                    if args.clip_grad:
                        scaler.unscale_(optimizer)
                        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    ema.update(model, step=step)
                    losses += value.detach()
                bar.update()
            mean_loss = float(losses) / steps_per_epoch
            if not np.isfinite(mean_loss):
                raise FloatingPointError(f"{folder}: the loss of epoch {epoch} is {mean_loss}; try a lower --lr")
            if epoch * SAVES // args.epochs == (epoch - 1) * SAVES // args.epochs:
                continue

            with watch("validation"):
                metrics = score(mixture(predict(ema.module, val, device)[None], [1.0], [1.0]), val.labels)
            row = {"epoch": epoch, "steps": epoch * steps_per_epoch, "lr": optimizer.param_groups[-1]["lr"],
                   "loss": mean_loss, "val_accuracy": metrics["accuracy"], "val_balanced_accuracy": metrics["balanced_accuracy"],
                   "val_nll": metrics["nll"], "seconds": round(time.perf_counter() - start, 1)}
            history.append(row)
            left = (time.perf_counter() - start) / (epoch - first_epoch) * (args.epochs - epoch)
            tqdm.write(f"{folder} epoch {epoch}/{args.epochs}: loss {mean_loss:.3f}, val accuracy {metrics['accuracy']:.3f}, "
                       f"balanced {metrics['balanced_accuracy']:.3f}, NLL {metrics['nll']:.3f}, {left:.0f} s left")
            with watch("saving"):
                weights = {name: tensor.detach().cpu() for name, tensor in ema.module.state_dict().items()}
                state = {**record, "epoch": epoch, "metrics": metrics, "history": history,
                         "state_dict": weights, "weights_sha256": weights_sha256(weights)}
                if good_enough(history, balanced_number(val.labels)):
                    best = metrics
                    save(state, folder / "best.pt")
                save({**state, "best": best, "raw_state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
                      "scaler": scaler.state_dict()}, folder / "last.pt")
                _write_log(folder / "log.csv", history)
    return best


def good_enough(history, n):
    """Whether the last validation is within one standard error of the highest balanced accuracy so far.

    history: rows of log.csv; n: validation pictures, see `balanced_number`. So best.pt ends as the latest checkpoint that n pictures
    cannot tell from the best: thirty of them would often prefer one of mid-schedule by a picture's luck, at
    several points of accuracy. Breiman et al. 1984's rule, with the longest training for the simplest model;
    the standard error is Agresti and Coull's (1998), of two more pictures right and two more wrong, so that p = 1 has one.
    """
    *_, last = values = [row["val_balanced_accuracy"] for row in history]
    p = (n * max(values) + 2) / (n + 4)
    return last >= max(values) - (p * (1 - p) / (n + 4)) ** 0.5


def balanced_number(labels):
    """How many pictures of equal classes would give balanced accuracy the standard error it has with these: K^2 / sum_c 1 / N_c."""
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    return float(len(counts) ** 2 / (1 / counts).sum())


def _comparable(args):
    return {name: value for name, value in args.items() if name not in FREE_TO_CHANGE}


def _write_log(path, history):
    with atomic_path(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(history)


def plain_args(args):
    """vars(args) as plain data, for artefacts."""
    return {name: value if isinstance(value, (int, float, bool, str, list, type(None))) else str(value)
            for name, value in vars(args).items()}
