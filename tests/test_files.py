"""Stored files: no damaged byte is believed, a full disk is one line, a folder has one writer."""

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, call

import build_ensemble
import distill
import evaluate
import train_teacher
from common import ensemble, files, models
from common.files import UserError


@pytest.fixture
def disk(tmp_path):
    """Mount a file system in memory: disk(size) -> its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def error_of(capfd, script, *words):
    """The one line with which a script refuses."""
    capfd.readouterr()
    assert call(script.main, *words) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# ----------------------------------------------------------------------------------------- damage


def write_one(kind, path):
    """Write a small file of one kind; returns how it is read."""
    if kind == "json":
        files.save_json({"a": [1, 2], "b": "é"}, path)
        return files.load_json
    models.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "optimizer": [torch.ones(2)]}, path)
    return models.load_checkpoint if kind == "load" else models.read_header


@pytest.mark.parametrize("kind", ["json", "load", "peek"])
def test_no_damaged_byte_of_a_stored_file_is_believed(tmp_path, kind):
    path = tmp_path / "file"
    read = write_one(kind, path)
    content = path.read_bytes()
    read(path)
    for place in range(0, len(content), 1 if kind == "json" else 5):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged|cut off"):
            read(path)
    others = (b"", b"[]", b"{}", b"[" * 100_000, content[:-1], content[:-40], content + b"\n")
    for other in others:
        path.write_bytes(other)
        with pytest.raises(UserError, match="damaged|cut off"):
            read(path)


def test_stored_files_are_read_by_other_programs_too(tiny):
    student = tiny.runs / "student"
    assert json.loads((tiny.runs / "ensemble" / "ensemble.json").read_text())["weights"]
    assert np.load(tiny.runs / "ensemble" / "view_001.npy").shape == (2, 105, 3)
    assert torch.load(student / "model.pt", weights_only=True)["kind"] == "student"
    for name in ("model.pt", "student.ts"):
        assert zipfile.ZipFile(student / name).testzip() is None


@pytest.mark.parametrize("build", ["finished", "interrupted"])
def test_a_damaged_view_is_computed_again_and_never_believed(inside, tmp_path, capfd, build):
    folder = tmp_path / "e"
    shutil.copytree("runs/ensemble", folder)
    view = folder / "view_001.npy"
    expected, content = view.read_bytes(), bytearray(view.read_bytes())
    content[len(content) // 2] ^= 1
    view.write_bytes(content)
    if build == "finished":
        assert "computes it anew" in error_of(capfd, distill, folder, "--output", tmp_path, *CPU)
    else:
        spec = files.load_json(folder / "ensemble.json")
        del spec["views"]
        files.save_json(spec, folder / "ensemble.json")
    assert call(build_ensemble.main, "--views", 3, "--output", folder, *CPU) == 0
    said = capfd.readouterr().out
    assert f"{view}: damaged" in said and "computed again" in said
    assert view.read_bytes() == expected
    ensemble.CachedLogits(folder, ensemble.load_ensemble(folder))


def test_an_ensemble_whose_description_is_damaged_is_built_again_when_told_to(
        inside, tmp_path, capfd):
    shutil.copytree("runs/ensemble", tmp_path / "e")
    (tmp_path / "e" / "ensemble.json").write_text("[]")
    words = ("--views", 3, "--output", tmp_path / "e", *CPU)
    assert "make it again with --overwrite" in error_of(capfd, build_ensemble, *words)
    assert call(build_ensemble.main, *words, "--overwrite") == 0


def test_a_damaged_log_is_left_out_of_the_report(inside, tmp_path, capfd):
    shutil.copytree("runs/test_resnet", tmp_path / "t")
    words = (tmp_path / "t" / "model.pt", "--skip-audit", "--output", tmp_path / "r", *CPU)
    for content in ("[]", "steps,loss\n1", "steps,val_balanced_accuracy,loss\n1,nan,2\n", "\0"):
        (tmp_path / "t" / "log.csv").write_text(content)
        assert call(evaluate.main, *words) == 0
        assert "log.csv: left out of the report" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------- disk


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(inside, disk, capfd):
    def left(folder):
        return sorted(path.name for path in folder.rglob("*") if path.is_file())

    small = disk("400k")
    pictures = ("--data-dir", "parts", "--view-size", 32, "--steps", 2, *CPU)
    words = ("--model", "test_resnet", *pictures, "--output", small)
    assert "last.pt: No space left" in error_of(capfd, train_teacher, *words)
    assert left(small) == []

    words = ("--views", 200, "--output", small / "e", *CPU)
    assert ".npy: No space left" in error_of(capfd, build_ensemble, *words)
    assert len(left(small)) > 1
    (small / "e" / "view_001.npy").unlink()
    assert all(name.startswith(("view_", "ensemble.json")) for name in left(small))

    small = disk("40k")
    words = ("runs/test_vit/model.pt", "--skip-audit", "--output", small / "r", *CPU)
    assert "No space left" in error_of(capfd, evaluate, *words)
    assert left(small) == []


def test_a_read_only_folder_and_a_file_in_place_of_one_are_one_line(inside, disk, tmp_path, capfd):
    folder = disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    student = ("runs/student/model.pt", "--skip-audit", *CPU)
    assert "Read-only" in error_of(capfd, evaluate, *student, "--output", folder / "r")
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        for script, words in ((evaluate, student), (distill, CPU), (build_ensemble, CPU)):
            assert "not a folder" in error_of(capfd, script, *words, "--output", output)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_over_the_largest_size_of_a_file_is_one_line(tmp_path):
    code = (
        "import torch; from common import cli, models; "
        "cli.run(lambda: models.save_checkpoint({'w': torch.ones(1_000_000)}, 'x/model.pt'))"
    )
    limit = 1_000_000
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: x/model.pt: File too large")
    assert list((tmp_path / "x").iterdir()) == []


def test_what_a_killed_process_left_half_written_is_removed_at_the_next_start(tmp_path):
    (tmp_path / ".new.tmp").mkdir()
    left = [tmp_path / ".last.pt.1234.tmp", tmp_path / ".new.tmp" / "metrics.json"]
    for path in (*left, tmp_path / "mine.tmp"):
        path.write_text("half")
    with files.exclusive(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"mine.tmp", ".lock"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


# ------------------------------------------------------------------------------------------ locks


HOLD = """
import os, sys
from common.files import UserError
from common.files import exclusive
folder, witness, held = sys.argv[1], sys.argv[2], 0
for _ in range(1500):
    try:
        with exclusive(folder):
            os.close(os.open(witness, os.O_CREAT | os.O_EXCL))  # fails where there are two holders
            held += 1
            os.unlink(witness)
    except UserError:
        pass
print(held)
"""


def test_a_folder_has_one_holder_under_stress(tmp_path):
    words = [sys.executable, "-c", HOLD, str(tmp_path / "a" / "b"), str(tmp_path / "witness")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [subprocess.Popen(words, **pipes) for _ in range(6)]
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert int(out) > 0


def test_the_files_of_a_report_are_of_one_run_or_missing(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    with pytest.raises(UserError), files.written_together(tmp_path, "ab") as folder:
        (folder / "a").write_text("new")
        raise UserError("between two files")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["old", "old"]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)  # between the moves, the worst moment
    with pytest.raises(KeyboardInterrupt), files.written_together(tmp_path, "ab") as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")
    assert list(tmp_path.iterdir()) == []
