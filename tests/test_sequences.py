"""Stages in the order in which people call them, who change their mind or their pictures."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, VIEW_SIZE, call, draw, make_set
from PIL import Image

import build_ensemble
import distill
import evaluate
import train_teacher
from common import report
from common.ensemble import load_ensemble
from common.models import load_checkpoint, read_header, save_checkpoint

TRAIN = ("--view-size", VIEW_SIZE, "--model", "test_resnet", "--steps", 2, *CPU)
PARTS = ("--data-dir", "parts", *TRAIN)
QUICK = ("--skip-audit", *CPU, "--output")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_baseline_that_was_trained_otherwise_is_told(inside, tmp_path, capfd):
    words = ("runs/student/model.pt", "--baseline", "runs/alone/model.pt", *QUICK, tmp_path)
    assert call(evaluate.main, *words) == 0
    said = "trained otherwise than the baseline runs/alone/model.pt (steps 105 against 7)"
    assert said in capfd.readouterr().out
    assert said in (tmp_path / "report.html").read_text("utf-8")


def test_runs_that_have_not_ended_are_named(home, capfd):
    make_set(home / "parts", {"train": 6, "test": 3})
    words = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_vit", "test_resnet")
    assert call(train_teacher.main, *words, "--steps", 2, *CPU) == 0
    (home / "runs" / "test_vit" / "model.pt").unlink()  # as after an interruption
    for main, more in ((build_ensemble.main, ("--views", 1, *CPU)),
                       (evaluate.main, (*QUICK, "r"))):
        assert call(main, *more) == 0
        assert "left out runs/test_vit: not trained to the end" in capfd.readouterr().out


def test_a_build_that_goes_on_keeps_the_number_of_views(inside, tmp_path, monkeypatch):
    words, write = ("--output", tmp_path / "e", *CPU), build_ensemble.write_view

    def once(folder, view, logits):
        write(folder, view, logits)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_ensemble, "write_view", once)
        assert call(build_ensemble.main, "--views", 5, *words) == 130
    for _ in range(2):  # the second time it is finished
        assert call(build_ensemble.main, *words) == 0
        assert load_ensemble(tmp_path / "e")["views"] == 5
    assert call(build_ensemble.main, "--views", 2, *words) == 0
    assert load_ensemble(tmp_path / "e")["views"] == 2


def test_weights_of_all_models_are_tried_before_the_first_is_trained(inside, tmp_path, capfd):
    shutil.copytree("runs/test_resnet", tmp_path / "test_resnet")
    (tmp_path / "w.pth").write_bytes(b"junk")
    words = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_vit", "test_resnet",
             "--weights", "runs/test_vit/model.pt", tmp_path / "w.pth", "--steps", 2, *CPU)
    assert call(train_teacher.main, *words, "--overwrite", "--output", tmp_path) == 2
    assert "w.pth does not load into test_resnet" in capfd.readouterr().err
    assert (tmp_path / "test_resnet" / "model.pt").is_file()
    assert not (tmp_path / "test_vit").exists()


def test_the_page_shows_pictures_as_its_model_reads_them(home, monkeypatch):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(("cross", "level", "upright")):
            (home / "parts" / part / name).mkdir(parents=True)
            for k in range(6):
                grey = draw((2, 0, 1)[label], rng).mean(2) * (4095 / 255)
                file = home / "parts" / part / name / f"{k}.png"
                Image.fromarray(grey.astype(np.uint16)).save(file)
    assert call(train_teacher.main, *PARTS, "--output", "old") == 0
    assert call(train_teacher.main, *PARTS, "--white-level", 4095) == 0
    assert call(build_ensemble.main, "--views", 1, *CPU) == 0
    assert call(distill.main, "--steps", 2, "-b", 8, *CPU) == 0
    brightest, real = [], report.occlusion_map

    def spied(student, frame, good):
        brightest.append(frame.max())
        return real(student, frame, good)

    monkeypatch.setattr(report, "occlusion_map", spied)
    words = ("old/test_resnet/model.pt", "runs/student/student.ts", *QUICK, "r")
    assert call(evaluate.main, *words) == 0
    assert min(brightest) > 100  # read with the old teacher's white level it is 15


def test_pictures_are_held_out_of_those_that_are_left(home):
    make_set(home / "parts", {"train": 6, "test": 3})
    assert call(train_teacher.main, *PARTS) == 0
    held = read_header("runs/test_resnet/model.pt")["dataset"]["held_out"]
    for path in held:
        shutil.copy(f"parts/{path}", f"parts/test/{path.split('/')[1]}/copy.png")
    assert call(train_teacher.main, *PARTS, "--overwrite", "--drop-leaks") == 0
    dataset = read_header("runs/test_resnet/model.pt")["dataset"]
    assert sorted(dataset["dropped"]) == sorted(held) and len(dataset["held_out"]) == 3
    assert not set(dataset["held_out"]) & set(held)
    assert call(build_ensemble.main, "--views", 1, *CPU) == 0


@pytest.mark.parametrize("start", ["from scratch", "pretrained"])
def test_a_training_says_how_it_starts(inside, tmp_path, capfd, start):
    words = () if start == "from scratch" else ("--weights", "runs/test_resnet/model.pt")
    assert call(train_teacher.main, *PARTS, *words, "--output", tmp_path) == 0
    assert f"M parameters, {start}, 2 steps" in capfd.readouterr().out


def test_a_finished_student_gets_another_threshold_though_its_ensemble_grew(inside, tmp_path):
    shutil.copytree("runs/ensemble", tmp_path / "e")
    words = (tmp_path / "e", "--steps", 2, "--good-class", "level", "--output", tmp_path / "s")
    words += CPU
    assert call(distill.main, *words) == 0
    assert call(build_ensemble.main, "--views", 4, "--output", tmp_path / "e", *CPU) == 0
    assert call(distill.main, *words, "--resume", "--max-miss-rate", 0.3) == 0


def test_who_learnt_from_other_pictures_is_told_and_nobody_else(inside, tmp_path, capfd):
    base = ("--model", "test_resnet", "--steps", 2, *CPU)
    made = {"size": ("--data-dir", Path("parts").resolve(), "--view-size", 48),
            "split": ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--val-fraction", 0.4)}
    for name, words in made.items():
        assert call(train_teacher.main, *words, *base, "--output", tmp_path / name) == 0
        file = tmp_path / name / "test_resnet" / "model.pt"
        capfd.readouterr()
        assert call(evaluate.main, "runs/test_vit/model.pt", file, *QUICK, tmp_path / "r") == 0
        assert "trained on other pictures" not in capfd.readouterr().out, name
    words = (tmp_path / "size" / "test_resnet" / "model.pt", "runs/student/student.ts")
    assert call(evaluate.main, *words, *QUICK, tmp_path / "r") == 0
    said = capfd.readouterr().out
    assert "student.ts: at another view size an exported file does not say" in said
    assert call(evaluate.main, *words, "runs/student/model.pt", *QUICK, tmp_path / "r") == 0
    assert "at another view size" not in capfd.readouterr().out


def test_a_run_folder_in_place_of_its_file_is_told(inside, tmp_path, capfd):
    assert call(evaluate.main, "--baseline", "runs/alone", *QUICK, tmp_path / "r") == 2
    assert "name the file in it, runs/alone/model.pt" in capfd.readouterr().err
    assert call(build_ensemble.main, "runs/test_vit", "--output", tmp_path / "e", *CPU) == 2
    assert "runs/test_vit: a folder; name a file in it" in capfd.readouterr().err


def test_resume_and_overwrite_exclude_each_other(inside, capfd):
    assert call(distill.main, "--resume", "--overwrite", *CPU) == 2
    assert "not allowed with argument" in capfd.readouterr().err


def test_a_teacher_is_resumed_without_the_file_that_it_started_from(inside, tmp_path):
    shutil.copy("runs/test_resnet/model.pt", tmp_path / "w.pt")
    words = (*PARTS, "--weights", tmp_path / "w.pt", "--output", tmp_path)
    assert call(train_teacher.main, *words) == 0
    (tmp_path / "w.pt").unlink()
    assert call(train_teacher.main, *words, "--resume") == 0
    assert call(train_teacher.main, *words, "--overwrite") == 2


def test_a_val_folder_that_came_or_went_is_told(home, capfd):
    make_set(home / "parts", {"train": 6, "test": 3})
    assert call(train_teacher.main, *PARTS) == 0
    make_set(home / "parts", {"val": 3}, seed=1)
    assert call(build_ensemble.main, "--views", 1, *CPU) == 2
    assert "the earlier stage had no val/, and there is one now" in capfd.readouterr().err
    assert call(train_teacher.main, *PARTS, "--overwrite") == 0
    shutil.rmtree("parts/val")
    assert call(build_ensemble.main, "--views", 1, *CPU) == 2
    assert "the earlier stage had val/, and there is none" in capfd.readouterr().err


def test_a_pool_without_pictures_says_how_to_build_without(home, capfd):
    make_set(home / "parts", {"train": 6, "test": 3})
    assert call(train_teacher.main, *PARTS) == 0
    (home / "parts" / "unlabelled").mkdir()
    assert call(build_ensemble.main, "--views", 1, *CPU) == 2
    assert "--unlabelled none" in capfd.readouterr().err
    shutil.copy("parts/test/level/l000.png", "parts/unlabelled")
    assert call(build_ensemble.main, "--views", 1, "--drop-leaks", *CPU) == 2
    assert "--unlabelled none" in capfd.readouterr().err
    assert call(build_ensemble.main, "--views", 1, "--unlabelled", "none", *CPU) == 0


def test_logits_that_float16_cannot_hold_are_refused(inside, tmp_path, capfd):
    state = load_checkpoint("runs/test_resnet/model.pt")
    state["state_dict"]["backbone.fc.weight"] *= 1e6
    save_checkpoint(state, tmp_path / "model.pt")
    words = (tmp_path / "model.pt", "--views", 1, "--output", tmp_path / "e", *CPU)
    assert call(build_ensemble.main, *words, "--dtype", "float16") == 2
    assert "cannot hold a logit" in capfd.readouterr().err


def test_weights_that_may_have_learnt_what_validates_now_are_told(inside, tmp_path, capfd):
    shutil.copytree("parts", tmp_path / "more")
    make_set(tmp_path / "more", {"train": 30})  # some more pictures of each class
    words = ("--weights", "runs/test_resnet/model.pt", "--output", tmp_path)
    assert call(train_teacher.main, *PARTS, *words) == 0
    assert "praises it" not in capfd.readouterr().out
    grown = ("--data-dir", tmp_path / "more", *TRAIN, *words, "--overwrite", "--allow-leakage")
    assert call(train_teacher.main, *grown) == 0
    assert "runs/test_resnet/model.pt learnt from other pictures" in capfd.readouterr().out


def test_a_foreign_model_in_runs_is_to_be_moved(home, capfd):
    (home / "runs" / "x").mkdir(parents=True)
    torch.save({}, home / "runs" / "x" / "model.pt")
    for main in (build_ensemble.main, evaluate.main):
        assert call(main, *CPU) == 2
        assert "or move it out of runs/" in capfd.readouterr().err
