"""What every script does the same way at the command line: errors, flags, device, timing.

The only file of common/ that looks at an argparse namespace; the others take plain values.
"""

import argparse
import errno
import re
import sys
import time

import torch

from common import distributed
from common.errors import UserError, first_line
from common.files import NO_ROOM
from common.images import WHITE_LEVEL, DecodedCache

# Flags that a resumed run may change: they do not decide what a training computes, or what they
# decide is compared by itself (epochs with the schedule, weights by whether there are any).
FREE_ON_RESUME = {
    "resume", "overwrite", "epochs", "device", "workers", "skip_bad", "output", "data_dir",
    "unlabelled", "model", "weights", "good_class", "max_miss_rate", "max_false_alarm_rate",
    "max_int8_drop", "onnx",
}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
CACHE = "runs/decoded"  # folder of the decoded pictures


def run(main):
    """Call `main()` and end the process with the status it deserves.

    0 done, 2 `UserError`, a full or forbidden disk or too little memory (one line on standard
    error), 130 interrupted; anything else is a failure of ours and keeps its traceback and
    status 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # not all file names are UTF-8
    try:
        main()
    except KeyboardInterrupt:
        print(
            "interrupted: what was saved stays valid; a training goes on with --resume, "
            "any other script when it is started again",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def explain(error):
    """What an exception means to the user, in one line; None for a failure of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM | NO_RIGHT:
        hint = "make room there" if error.errno in NO_ROOM else "see who may read and write there"
        return f"{error.filename}: {error.strerror}; {hint}, or use another folder"
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if no_memory or "DefaultCPUAllocator" in str(error):  # a plain RuntimeError of torch
        return f"out of memory ({first_line(error)}); try a smaller --batch-size"
    return None


# ------------------------------------------------------------------------------- values of flags


def number(convert, accepts, wanted):
    """An argparse type: a number that `accepts` lets through, described as `wanted`."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


# Comparisons with nan are false, so nan never passes.
positive_int = number(int, lambda v: v >= 1, "a whole number of at least 1")
natural = number(int, lambda v: v >= 0, "a whole number of at least 0")
positive_float = number(float, lambda v: 0 < v < float("inf"), "a number above 0")
non_negative_float = number(float, lambda v: 0 <= v < float("inf"), "a number of at least 0")
fraction = number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
open_fraction = number(float, lambda v: 0 < v < 1, "a number between 0 and 1, ends excluded")


def regex(text):
    """argparse type: a regular expression with at least one group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    if not groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no (group) to name the part by")
    return text


def changed_recipe(recipe, words):
    """A ViewRecipe with the words of --view-recipe. Raises UserError for wrong ones."""
    try:
        return recipe.changed(words)
    except ValueError as error:
        raise UserError(f"--view-recipe: {error}") from None


def stored_recipe(recipe_class, record, path):
    """The ViewRecipe in an artefact at `path`. Raises UserError for one of another version."""
    try:
        return recipe_class.from_record(record["view_recipe"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------- groups of flags


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the script's docstring as it is, and each flag's default."""

    def _get_help_string(self, action):
        """The help line alone where there is no default to show, or it says what happens itself."""
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def parser(docstring):
    """An ArgumentParser that shows the script's docstring and each flag's default."""
    return argparse.ArgumentParser(description=docstring, formatter_class=Formatter)


def add_device_flag(g):
    """--device, to an argument group or parser."""
    g.add_argument("--device", default="auto",
                   help="auto (cuda, then mps, then cpu) or a torch device")


def add_reading_flags(p):
    """How pictures are read, as a group of its own."""
    g = p.add_argument_group("reading pictures")
    g.add_argument("-j", "--workers", type=positive_int, default=2,
                   help="threads that decode pictures")
    g.add_argument("--skip-bad", action="store_true",
                   help="leave unreadable pictures out, and say so")
    return g


def decoded_cache(args):
    """The cache that `add_reading_flags` describes."""
    return DecodedCache(CACHE, args.workers, args.skip_bad)


def add_white_level_flag(g):
    """--white-level, to an argument group."""
    g.add_argument("--white-level", type=positive_int, default=WHITE_LEVEL,
                   help="value of a 16-bit grey picture that is white; 4095 for a 12-bit camera")


def add_training_flags(p, lr=1e-3, lr_note=""):
    """Optimisation, as a group of its own. lr, lr_note: default of --lr, and words on it."""
    g = p.add_argument_group("optimisation")
    g.add_argument("-b", "--batch-size", type=positive_int, default=24,
                   help="pictures per step, of all processes together")
    g.add_argument("--lr", type=positive_float, default=lr,
                   help=f"peak learning rate of new layers{lr_note}")
    g.add_argument("--weight-decay", type=non_negative_float, default=0.05,
                   help="AdamW's weight decay")
    g.add_argument("--ema-decay", type=fraction, default=0.998,
                   help="decay per step of the averaged weights; 0 is off")
    g.add_argument("--clip-grad", type=non_negative_float, default=1.0,
                   help="largest gradient norm; 0 is off")
    g.add_argument("--balance-classes", action="store_true",
                   help="weight labelled pictures by the inverse of their class's frequency")
    return g


def add_run_flags(p):
    """Where a training run is written and how it begins, to a parser."""
    p.add_argument("--resume", action="store_true",
                   help="go on from last.pt of an interrupted run")
    p.add_argument("--overwrite", action="store_true",
                   help="replace a run that is already in the output folder")


def plain(args):
    """The flags as plain data, for artefacts."""
    kept = (int, float, bool, str, list, type(None))
    return {k: v if isinstance(v, kept) else str(v) for k, v in vars(args).items()}


# -------------------------------------------------------------------------------- device and time


def pick_device(name):
    """`--device` as a torch.device; 'auto' takes cuda, then mps, then cpu. Prints which."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = distributed.own_device(torch.device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({first_line(error)}); try --device cpu"
        ) from None
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
    print(f"device: {device}{threads}{processes}")
    return device


class Stopwatch:
    """Seconds per part of a script: `watch.lap("pictures")` after each part; print(watch)."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()
        self.parts = {}

    def lap(self, part):
        """Count the time since the last lap to this part."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def __str__(self):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"time: {time.perf_counter() - self.begin:.1f} s ({parts})"
