"""The chain as a factory runs it: a 12-bit camera, parts, a damaged file, flags of its own."""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, call, draw
from PIL import Image

import build_ensemble
import distill
import evaluate
import infer
import train_teacher
from common import models, splits, training, validation
from common.export import load_exported
from common.losses import fit_temperature, fit_weights
from common.pictures import DecodedCache

WHITE, PATTERN = 4095, r"(?:^|/)[clu](\d+)_"
PARTS = {"train": range(12), "test": range(20, 30), "unlabelled": range(40, 48)}
SHOTS, CLASSES = 2, ("cross", "level", "upright")
KEPT = ("--skip-bad", *CPU)


def photograph(root):
    """12-bit grey pictures, twice as large, two of each part; parts 2k and 2k + 1 look alike."""
    for side, parts in PARTS.items():
        for label, name in enumerate(CLASSES):
            folder = root / side / ("" if side == "unlabelled" else name)
            folder.mkdir(parents=True, exist_ok=True)
            for part in parts:
                for shot in range(SHOTS):
                    rng = np.random.default_rng([label, part // 2, shot, *side.encode()])
                    grey = draw((2, 0, 1)[label], rng).mean(2).repeat(2, 0).repeat(2, 1)
                    deep = Image.fromarray((grey * (WHITE / 255)).astype(np.uint16))
                    deep.save(folder / f"{name[0]}{100 * label + part}_{shot}.png")
    (root / "train" / "level" / "l999_0.png").write_bytes(b"junk")


@pytest.fixture(scope="module")
def factory(tiny, tmp_path_factory):
    """.home and what the stages said: .trained, .distilled; .biases: arguments of fit_biases."""
    home = tmp_path_factory.mktemp("factory")
    photograph(home / "parts")
    start, biases = tiny.runs / "test_vit" / "model.pt", []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(build_ensemble, "PICTURE_VIEWS", 700)
        patch.setattr(training, "fit_biases", spied(training.fit_biases, biases))
        train = ("--data-dir", "parts", "--view-size", "32x40", "--white-level", WHITE)
        train += ("--group-regex", PATTERN, "--val-fraction", 0.5, "--balance-classes")
        train += ("--model", "test_vit", "--weights", start, "--steps", 30, "-b", 16)
        student = ("--img-size", 48, "--good-class", "level", "--steps", 60, "-b", 16)
        student += ("--max-int8-drop", 100)
        said = {}
        for script, words in ((train_teacher, train), (build_ensemble, ()), (distill, student),
                              (evaluate, ())):
            said[script] = spoken(script.main, *words, *KEPT)
    return SimpleNamespace(home=home, biases=biases, trained=said[train_teacher],
                           distilled=said[distill])


def spied(function, calls):
    """The function, that notes its arguments."""
    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)
    return noted


def spoken(main, *words):
    """What a script that succeeds prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert call(main, *words) == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture
def opened(factory, monkeypatch):
    """(train, val) as the stages had them; the factory's folder is entered."""
    monkeypatch.chdir(factory.home)
    dataset = models.read_header("runs/test_vit/model.pt")["dataset"]
    return splits.open_training(DecodedCache("runs/decoded", skip_bad=True), dataset)[:2]


def parts_of(pictures):
    return validation.groups_of(pictures, PATTERN)


def test_a_damaged_file_is_left_out_and_the_asked_share_validates_by_parts(opened):
    train, val = opened
    assert (len(train), len(val)) == (36, 36)
    assert not set(parts_of(train)) & set(parts_of(val))


def test_training_says_what_the_views_lose(factory):
    said = "pictures of 96 x 80 px (median) are reduced to 40 x 32: a defect under 8 px"
    assert said in factory.trained


def test_a_pretrained_backbone_learns_more_slowly_than_its_head(factory):
    state = models.load_checkpoint(factory.home / "runs" / "test_vit" / "last.pt")
    scales = [group["lr_scale"] for group in state["optimizer"]["param_groups"]]
    assert max(scales) == 1 and min(scales) < 0.5


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t"])
def test_a_teacher_sees_pictures_normalised_as_its_weights_want_them(name):
    model = models.create_teacher(name, 2, [32, 32])
    config = model.backbone.pretrained_cfg
    mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
    pixels = torch.full((1, 3, 32, 32), 51.0)
    expected = ((0.2 - mean) / std).view(1, 3, 1, 1)
    assert torch.allclose(model.normalise(pixels), expected.expand(1, 3, 32, 32), atol=1e-5)


def test_temperatures_and_weights_are_fitted_on_validation(factory, opened):
    _, val = opened
    spec = json.loads((factory.home / "runs" / "ensemble" / "ensemble.json").read_text())
    teacher, _ = models.load_model("runs/test_vit/model.pt", torch.device("cpu"))
    logits = models.predict(teacher, val, torch.device("cpu"))
    temperature = fit_temperature(logits, val.labels)
    assert spec["temperatures"] == pytest.approx([temperature], rel=1e-4)
    assert spec["weights"] == pytest.approx(fit_weights(logits[None] / temperature, val.labels),
                                            rel=1e-4)
    assert spec["views"] == 700 // (36 + 48)  # of the labelled and the unlabelled pictures


def test_biases_count_each_part_once(factory, opened):
    ((_, labels, parts),) = factory.biases  # of the teacher: the student is not balanced
    assert parts == parts_of(opened[1]) and len(labels) == 36


def test_the_promise_of_the_threshold_and_the_report_count_parts(factory, opened):
    _, val = opened
    point = load_exported("runs/student/student.ts")[1]["operating_point"]
    defects = {part for part, label in zip(parts_of(val), val.labels.tolist()) if label != 1}
    assert point["pictures"] == len(defects) == 12
    report = json.loads((factory.home / "runs" / "report" / "metrics.json").read_text())
    scores = report["models"]["runs/student/student.ts"]["sets"]["test"]
    assert scores["n"] == 60 and scores["operating_point"]["miss"]["n"] == 20
    assert scores["operating_point"]["false_alarm"]["n"] == 10


def test_parts_that_look_alike_are_told_beside_the_promise(factory):
    assert "warning: of 12 validation defects only 6 are no near-duplicates" in factory.distilled


def test_the_file_reads_12_bits_and_sees_the_students_own_size(factory, monkeypatch):
    monkeypatch.chdir(factory.home)
    student, metadata = load_exported("runs/student/student.ts")
    model, state = models.load_model("runs/student/model.pt", torch.device("cpu"))
    assert metadata["white_level"] == WHITE and state["img_size"] == [48, 48]
    file = "parts/test/cross/c20_0.png"
    picture, brightest, _ = infer.decode(Path(file).read_bytes(), metadata["white_level"])
    assert picture.max() > 100 and brightest > 1000
    cache = DecodedCache("runs/decoded", skip_bad=True)
    dataset = {**state["dataset"], "classes": state["classes"]}
    tests = splits.open_tests(cache, ["parts/test"], dataset)["test"]
    with torch.no_grad():
        logits = model(tests.batch([0]).permute(0, 3, 1, 2).float())
        expected = torch.softmax(logits / metadata["temperature"], 1)
        answer = student(torch.from_numpy(picture))
    assert tests.path(0) == "test/cross/c20_0.png"
    assert torch.allclose(answer, expected, atol=1e-4)


def test_unlabelled_pictures_of_tested_parts_are_refused(factory, monkeypatch, capfd):
    monkeypatch.chdir(factory.home)
    shot = factory.home / "parts" / "unlabelled" / "c20_7.png"  # part 20 is tested
    shot.write_bytes((factory.home / "parts" / "unlabelled" / "c40_0.png").read_bytes())
    try:
        words = ("--output", "runs/again", "--views", 1, *KEPT)
        assert call(build_ensemble.main, *words) == 2
    finally:
        shot.unlink()
    said = capfd.readouterr().err
    assert re.search("1 unlabelled pictures show parts .*c20_7.png = test/cross/c20_", said)
