"""What every script does the same way at the command line: errors, value checks, device, timing."""

import argparse
import re
import sys
import time
from contextlib import contextmanager

import torch


class UserError(Exception):
    """Wrong usage or input. The message is one line: what, where, how to mend it."""


def run(main):
    """Call `main()` and end the process with the status it deserves.

    0 done, 2 `UserError` (one line on standard error), 130 interrupted; anything else is a
    failure of ours and keeps its traceback and status 1.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what was saved stays valid", file=sys.stderr)
        sys.exit(130)


def _number(convert, accepts, wanted):
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
positive_int = _number(int, lambda v: v >= 1, "a whole number of at least 1")
natural = _number(int, lambda v: v >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda v: 0 < v < float("inf"), "a number above 0")
non_negative_float = _number(float, lambda v: 0 <= v < float("inf"), "a number of at least 0")
fraction = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
open_fraction = _number(float, lambda v: 0 < v < 1, "a number between 0 and 1, ends excluded")


def regex(text):
    """argparse type: a regular expression with at least one group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}")
    if not groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no (group) to name the part by")
    return text


def parser(docstring):
    """An ArgumentParser that shows the script's docstring and each flag's default."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):  # where the default is None, the help line itself says what happens
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    return argparse.ArgumentParser(description=docstring, formatter_class=Formatter)


def add_device_flag(p):
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")


def add_data_flags(p):
    p.add_argument("-j", "--workers", type=positive_int, default=2, help="threads that decode pictures")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable pictures out, and say so")
    p.add_argument("--cache-dir", default="runs/packs", help="folder for decoded pictures")


def add_leak_flags(p):
    leaks = p.add_mutually_exclusive_group()
    leaks.add_argument("--drop-leaks", action="store_true", help="leave training pictures out that a test* folder holds too")
    leaks.add_argument("--allow-leakage", action="store_true", help="train although test pictures are among the training pictures")


def add_training_flags(p):
    p.add_argument("--weight-decay", type=non_negative_float, default=0.05, help="AdamW's weight decay")
    p.add_argument("--warmup", type=fraction, default=0.1, help="share of all steps with rising learning rate")
    p.add_argument("--ema-decay", type=fraction, default=0.998, help="decay per step of the averaged weights; 0 is off")
    p.add_argument("--clip-grad", type=non_negative_float, default=1.0, help="largest gradient norm; 0 is off")
    p.add_argument("--balance-classes", action="store_true", help="weight labelled pictures by the inverse of their class's frequency")
    p.add_argument("--resume", action="store_true", help="go on from last.pt of an interrupted run")
    p.add_argument("--overwrite", action="store_true", help="replace a run that is already in the output folder")


def pick_device(name):
    """`--device` as a torch.device; 'auto' takes cuda, then mps, then cpu. Prints which."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu")
    print(f"device: {device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""))
    return device


class Stopwatch:
    """Adds up seconds per named part of a script: `with watch("training"): ...`; print(watch)."""

    def __init__(self):
        self.begin, self.parts = time.perf_counter(), {}

    @contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

    def __str__(self):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"time: {time.perf_counter() - self.begin:.1f} s ({parts})"
