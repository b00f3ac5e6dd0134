"""What every script does the same way at the command line: errors, flags, device, timing.

The only file of common/ that looks at an argparse namespace; the others take plain values.
"""

import argparse
import ctypes
import errno
import sys
import time
from contextlib import suppress
from itertools import pairwise

import torch

from common import distributed
from common.files import UserError, first_line
from common.pictures import DecodedCache

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota, largest size of a file
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN}
GONE = {errno.ENOENT}  # moved away since its folder was listed
CACHE = "runs/decoded"  # folder of the decoded pictures
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SEEDS = 2**32  # how many numbers --seed may be
laps = []  # (part of the script, when it ended)


def run(main):
    """Call `main()` and end the process with the status it deserves.

    0 done, 2 `UserError`, a full or forbidden disk or too little memory (one line on standard
    error), 130 interrupted; anything else is a failure of ours: a traceback, and 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # not all file names are UTF-8
    laps[:] = [("start", time.perf_counter())]
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
        message = in_one_line(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def in_one_line(error):
    """What an exception means to the user; None for a failure of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in PASSING:
        return f"{error.filename}: {error.strerror}; start again when the disk or share answers"
    if isinstance(error, OSError) and error.errno in GONE:
        return f"{error.filename}: {error.strerror}; start again when nothing moves files there"
    if isinstance(error, OSError) and error.errno in NO_ROOM | NO_RIGHT:
        hint = "make room there" if error.errno in NO_ROOM else "see who may read and write there"
        return f"{error.filename}: {error.strerror}; {hint}, or use another folder"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"{error.strerror}; allow this shell more by ulimit -n 2048, or store fewer views"
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if no_memory or "DefaultCPUAllocator" in str(error):  # a plain RuntimeError of torch
        return f"out of memory ({first_line(error)}); try a smaller --batch-size"
    return None


def lap(part):
    """Say that a part of the script ends here: its seconds are those since the last lap."""
    laps.append((part, time.perf_counter()))


def print_laps():
    """Print the seconds of all parts in one line."""
    seconds = {}
    for (_, begin), (part, end) in pairwise(laps):
        seconds[part] = seconds.get(part, 0.0) + end - begin
    parts = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
    print(f"time: {sum(seconds.values()):.1f} s ({parts})")


# ------------------------------------------------------------------------------- values of flags


class Once(argparse.Action):
    """A flag with a list that may be given once: argparse alone would keep the last list."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option_string} given twice; put all its values behind one")
        setattr(namespace, self.dest, values)


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


def sides(text):
    """[height, width] of '128', a square, or of '96x240'; ValueError for anything else."""
    numbers = [int(side) for side in text.lower().split("x")]
    height, width = numbers * 2 if len(numbers) == 1 else numbers
    return [height, width]


# Comparisons with nan are false, so nan never passes.
positive_int = number(int, lambda v: v >= 1, "a whole number of at least 1")
picture_size = number(
    sides, lambda both: all(32 <= side <= 4096 for side in both),
    "a side N or HxW, height x width, each from 32 to 4096 px",
)
seed = number(int, lambda v: 0 <= v < SEEDS, f"a whole number from 0 to {SEEDS - 1}")
positive_float = number(float, lambda v: 0 < v < float("inf"), "a number above 0")
non_negative_float = number(float, lambda v: 0 <= v < float("inf"), "a number of at least 0")
fraction = number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
open_fraction = number(float, lambda v: 0 < v < 1, "a number between 0 and 1, ends excluded")


def recipe(make, words, where):
    """make(words), a `ViewRecipe`; a UserError that says where wrong words stand."""
    try:
        return make(words)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------- groups of flags


def parser(docstring):
    """An ArgumentParser that shows the script's docstring as it is."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=docstring, formatter_class=form)


def add_common_flags(p):
    """The device, and how pictures are read, see `decoded_cache`."""
    p.add_argument("--device", default="auto",
                   help="auto (the default: cuda, then mps, then cpu) or a torch device")
    g = p.add_argument_group("reading pictures")
    g.add_argument("-j", "--workers", type=positive_int, default=2,
                   help="threads that decode pictures (default: %(default)s)")
    g.add_argument("--skip-bad", action="store_true",
                   help="leave unreadable pictures out, and say so")


def decoded_cache(args):
    """The cache of decoded pictures that the flags describe."""
    return DecodedCache(CACHE, args.workers, args.skip_bad)


def add_leak_flags(g):
    """--drop-leaks and --allow-leakage, to an argument group."""
    leaks = g.add_mutually_exclusive_group()
    leaks.add_argument("--drop-leaks", action="store_true",
                       help="leave pictures out that a test* folder holds too or whose part it "
                       "shows (--group-regex), and pictures that validation nearly repeats")
    leaks.add_argument("--allow-leakage", action="store_true",
                       help="go on although test pictures are among the others")


def add_training_flags(p, lr=1e-3, lr_note="learning rate (default: %(default)s)"):
    """How a run begins, and optimisation. lr, lr_note: default of --lr, and words on it."""
    begin = p.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true",
                       help="go on from last.pt of an interrupted run")
    begin.add_argument("--overwrite", action="store_true",
                       help="replace a run that is already in the output folder")
    g = p.add_argument_group("optimisation")
    g.add_argument("-b", "--batch-size", type=positive_int, default=24,
                   help="pictures per step, of all processes together (default: %(default)s)")
    g.add_argument("--lr", type=positive_float, default=lr,
                   help=f"peak {lr_note}")
    g.add_argument("--weight-decay", type=non_negative_float, default=0.05,
                   help="AdamW's weight decay (default: %(default)s)")
    g.add_argument("--clip-grad", type=non_negative_float, default=1.0,
                   help="largest gradient norm; 0 is off (default: %(default)s)")
    g.add_argument("--balance-classes", action="store_true",
                   help="draw labelled pictures of each class as often, and fit the last layer's "
                   "biases on validation so that classes weigh alike")


# ---------------------------------------------------------------------------------------- device


def pick_device(name):
    """`--device` as a torch.device; 'auto' takes cuda, then mps, then cpu. Prints which.

    The process then keeps the memory that it frees (see `keep_freed_memory`).
    """
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
    keep_freed_memory()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"device: {device}{threads}{processes}")
    return device


def keep_freed_memory():
    """Let glibc keep what is freed, since the next step asks for the same hundreds of MB.

    Given back to the system and asked for again they were 2 to 12 % of a training's time on a CPU.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # older ones' most
