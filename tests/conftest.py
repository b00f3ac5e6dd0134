"""A tiny labelled set, and the scripts run on it once, in process, as a user would call them."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import build_ensemble
import distill
import evaluate
import train_teacher
from common import cli
from common.pictures import WHITE_LEVEL, DecodedCache
from infer import decode

ROOT = Path(__file__).parent.parent
TEACHERS = ("test_vit", "test_resnet")  # timm's smallest
SIZE, VIEW_SIZE = [32, 40], "32x40"  # no square, so that whatever takes one for granted fails
CPU = ("--device", "cpu")
DATASET = {"view_size": SIZE, "white_level": WHITE_LEVEL}  # how splits.py is told to read pictures


def read_picture(file):
    """uint8 RGB [H, W, 3] of a path or binary file, as infer.py reads it."""
    return decode(file.read() if hasattr(file, "read") else Path(file).read_bytes())[0]


def draw(label, rng):
    """uint8 [40, 48, 3]: a bar whose direction is the class (0 level, 1 upright, 2 both)."""
    picture = rng.integers(60, 120, (40, 48, 3))
    row, column = rng.integers(10, 28), rng.integers(12, 34)
    if label != 1:
        picture[row:row + 4, 6:42] += 110
    if label != 0:
        picture[5:35, column:column + 4] += 110
    return picture.clip(0, 255).astype(np.uint8)


def make_set(root, splits, seed=0):
    """ImageFolder of three classes; splits: {folder: pictures per class}, unlabelled ones flat."""
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        for label, name in enumerate(("cross", "level", "upright")):
            folder = root / split / ("" if split == "unlabelled" else name)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture = Image.fromarray(draw((2, 0, 1)[label], rng))
                picture.save(folder / f"{name[0]}{number:03d}.png")
    return root


def call(main, *words):
    """Run a script's main() with command line words; returns the exit status of a process."""
    argv, sys.argv = sys.argv, [main.__module__, *map(str, words)]
    try:
        cli.run(main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The chain's artefacts: .root (the working directory), .data, .runs."""
    root = tmp_path_factory.mktemp("chain")
    make_set(root / "parts", {"train": 24, "test": 20, "test_other": 12, "unlabelled": 16})
    before = Path.cwd()
    os.chdir(root)
    try:
        pictures = ("--data-dir", "parts", "--view-size", VIEW_SIZE)
        steps = ("--steps", 160, "-b", 16)
        assert call(train_teacher.main, *pictures, "--model", *TEACHERS, *steps, *CPU) == 0
        assert call(build_ensemble.main, "--views", 3, *CPU) == 0
        student = ("-b", 16, "--good-class", "level", "--max-int8-drop", 20, *CPU)
        assert call(distill.main, "--steps", 105, *student) == 0
        alone = ("--alpha", 0, "--output", "runs/alone")
        assert call(distill.main, "--steps", 7, *alone, *student) == 0
        assert call(evaluate.main, "--baseline", "runs/alone/model.pt", *CPU) == 0
    finally:
        os.chdir(before)
    return SimpleNamespace(root=root, data=root / "parts", runs=root / "runs")


@pytest.fixture
def inside(tiny, monkeypatch):
    """The chain's working directory, entered."""
    monkeypatch.chdir(tiny.root)
    return tiny


@pytest.fixture
def no_export(monkeypatch):
    """distill.py ends with its training: to export takes 3 s, and has tests of its own."""
    monkeypatch.setattr(distill, "export_student", lambda *_: None)


@pytest.fixture
def cache(tmp_path):
    """An empty decoded cache."""
    return DecodedCache(tmp_path / "decoded")
