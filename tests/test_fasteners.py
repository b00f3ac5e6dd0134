"""The embedded set: repeatable, complete or absent, and without shortcuts."""

import json

import numpy as np
import pytest
from PIL import Image

from common.audit import shortcuts
from common.fasteners import CLASSES, dataset
from common.fasteners.canvas import SIZE
from common.fasteners.dataset import SEED
from common.fasteners.drawing import draw

SMALL = {"train": 2, "val": 1, "test": 1, "test_shifted": 1, "unlabelled": 2}


def test_a_picture_is_a_pure_function_of_its_key():
    first = [draw(name, (SEED, 0, 7)) for name in CLASSES]
    again = [draw(name, (SEED, 0, 7)) for name in reversed(CLASSES)][::-1]
    assert all((a == b).all() for a, b in zip(first, again))
    assert first[0].shape == (SIZE, SIZE, 3) and first[0].dtype == np.uint8
    assert (draw("good", (SEED, 0, 8)) != first[1]).any()


def test_the_class_changes_the_part_and_nothing_around_it():
    """Same key, other class: same part, scene and camera, so no nuisance depends on the class."""
    for index in range(6):
        good = draw("good", (SEED, 0, index)).astype(int)
        for name in ("rusted", "scratched", "thread_damaged"):
            other = draw(name, (SEED, 0, index)).astype(int)
            changed = np.abs(other - good).max(2) > 12
            assert 0.002 < changed.mean() < 0.5, (name, index)
            assert not changed[[0, 0, -1, -1], [0, -1, 0, -1]].any()


def test_the_set_is_written_whole_and_byte_identical(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PER_CLASS", SMALL)
    # Worker processes would not see the small table.
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", InProcess)
    a, b = (dataset.make_dataset(tmp_path / name) for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 6 * sum(SMALL.values()) + 1
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    assert not [p for p in tmp_path.iterdir() if p.name not in "ab"]
    marker = json.loads((a / dataset.MARKER).read_text())
    (a / dataset.MARKER).write_text(json.dumps({**marker, "seed": 1}))
    with pytest.raises(ValueError, match="remove it"):
        dataset.make_dataset(a)


class InProcess:
    """A process pool's `map`, here."""

    def __init__(self, workers):
        assert workers == min(dataset.cores(), 61)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, jobs, chunksize):
        return map(function, jobs)


@pytest.mark.parametrize("text, most", [("max 100000", 4), ("150000 100000", 2), ("100 100000", 1)])
def test_no_more_processes_than_a_container_may_run(tmp_path, monkeypatch, text, most):
    monkeypatch.setattr(dataset.os, "sched_getaffinity", lambda process: range(4), raising=False)
    monkeypatch.setattr(dataset, "CPU_MAX", tmp_path / "cpu.max")
    assert dataset.cores() == 4
    dataset.CPU_MAX.write_text(text + "\n")
    assert dataset.cores() == most


def test_linear_classifiers_on_thumbnails_and_mean_colour_stay_near_chance():
    pictures = [Image.fromarray(draw(CLASSES[i % 6], (SEED, 99, i))) for i in range(720)]
    labels = np.arange(720) % 6
    some = len(CLASSES) * dataset.PER_CLASS["train"]  # as many as the set has labels for
    # Chance is 0.167, its 95 % range on 612 pictures reaches up to 0.20.
    for side, limit in ((8, 0.31), (1, 0.22)):
        small = [p.resize((side, side), Image.Resampling.BOX) for p in pictures]
        x = np.array([np.asarray(p).ravel() for p in small], float)
        answer = shortcuts.discriminant(x[:some], labels[:some], x[some:])
        assert (answer.argmax(1) == labels[some:]).mean() < limit
