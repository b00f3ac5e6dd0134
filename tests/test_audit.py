"""The audit: copies, shortcuts, groups; what is planted is found, what merely looks alike is not."""

import argparse
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

import build_ensemble
import train_teacher
from common import audit, data, duplicates, shortcuts
from common.checkpoints import load
from common.cli import UserError
from common.ensemble import load_ensemble
from common.synthetic import CLASSES, draw
from conftest import call, make_set

CHANGES = {
    "encoded again": lambda im: encoded(im, "JPEG", quality=75),
    "resized": lambda im: im.resize((im.width * 2 // 3, im.height * 2 // 3), Image.Resampling.BILINEAR),
    "brightened": lambda im: ImageEnhance.Brightness(im).enhance(1.25),
    "mirrored": lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda im: im.transpose(Image.Transpose.ROTATE_90),
    "cropped": lambda im: im.crop((2, 4, 2 + round(0.95 * im.width), 4 + round(0.95 * im.height))),
}


def encoded(image, form, **settings):
    file = io.BytesIO()
    image.save(file, form, **settings)
    return Image.open(file).convert("RGB")


def picture(number):
    return Image.fromarray(draw(CLASSES[number % 6], (5, 0, number)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """24 training pictures; 12 new test pictures and one changed copy of each of the first six training ones."""
    root = tmp_path_factory.mktemp("planted")
    for number in range(24):
        put(root / "train", number, picture(number))
    for number in range(24, 36):
        put(root / "test", number, picture(number))
    for number, change in enumerate(CHANGES.values()):
        put(root / "test", 100 + number, change(picture(number)), CLASSES[number % 6])
    return root


def put(folder, number, image, name=None):
    folder = folder / (name or CLASSES[number % 6])
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{number:03d}.png")


def sets_of(root, side=128):
    args = argparse.Namespace(cache_dir=root / "packs", workers=1, skip_bad=False)
    return {name: data.whole(data.open_pack(root / name, side, args)) for name in ("train", "test")}


def test_changed_copies_are_found_and_parts_that_look_alike_are_not(planted):
    copies, conflicts = audit.find_copies(sets_of(planted))
    assert {(c["picture"][-7:-4], c["of"][-7:-4]) for c in copies} == {(f"{100 + n}", f"{n:03d}") for n in range(6)}
    assert {c["kind"] for c in copies} == {"near"} and not conflicts


@pytest.mark.parametrize("side, words", [(128, "of test are nearly copies of"), (64, "of test are perhaps nearly copies (at 64 px")])
def test_near_copies_are_called_perhaps_so_where_the_pack_is_coarse(planted, side, words):
    assert words in "\n".join(audit.describe(audit.audit(sets_of(planted, side), planted / "packs"), CLASSES))


def test_equal_bytes_equal_pixels_and_differing_labels_are_told_apart(tmp_path):
    for number in range(12):
        put(tmp_path / "train", number, picture(number))
    for number in range(12, 18):
        put(tmp_path / "test", number, picture(number))
    file = next((tmp_path / "train" / "bent").glob("*.png"))
    (tmp_path / "test" / "bent" / "same_bytes.png").write_bytes(file.read_bytes())
    with Image.open(next((tmp_path / "train" / "good").glob("*.png"))) as image:
        image.save(tmp_path / "test" / "rusted" / "same_pixels.bmp")
    (tmp_path / "train" / "rusted" / "twin.png").write_bytes(file.read_bytes())
    sets = sets_of(tmp_path)
    copies, conflicts = audit.find_copies(sets)
    assert {(c["picture"], c["kind"]) for c in copies} == {("test/bent/same_bytes.png", "bytes"), ("test/rusted/same_pixels.bmp", "pixels")}
    assert [(c["set"], c["of"], c["picture"]) for c in conflicts] == [("train", f"train/bent/{file.name}", "train/rusted/twin.png")]
    text = "\n".join(audit.describe(audit.audit(sets, tmp_path / "packs"), CLASSES))
    assert "1 of 8 pictures of test are byte for byte in train" in text and "different labels" in text


def test_descriptors_do_not_change_with_symmetry_brightness_and_contrast():
    thumbnails = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = duplicates.descriptors(thumbnails)
    for turned in duplicates.symmetries(thumbnails):
        assert torch.allclose(duplicates.descriptors(3 * turned + 7), expected, atol=1e-5)
    assert (expected @ expected.T - torch.eye(5)).max() < 0.999


def test_likeness_is_one_for_equal_detail_and_low_for_other_detail():
    noise = 255 * torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(duplicates.likeness(noise[0], 0.5 * noise[0] + 30), torch.ones(4), atol=1e-2)
    shifted = torch.roll(noise[0], (3, -2), (1, 2))
    assert duplicates.likeness(noise[0], shifted).min() > 0.8
    assert duplicates.likeness(noise[0], noise[1]).max() < 0.3


def test_class_balanced_ridge_sees_through_a_large_class():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [450, 50])
    x = (labels + rng.normal(0, 0.7, 500))[:, None]
    answer = shortcuts.ridge(x, labels, [x])[0].argmax(1)
    recalls = [(answer[labels == c] == c).mean() for c in (0, 1)]
    assert min(recalls) > 0.65  # unbalanced, the small class would be missed


def test_group_proposals_follow_file_names():
    crops = [f"train/hole/{photo}_{part}.jpg" for photo in range(30) for part in range(4)]
    proposal = audit.propose_groups(crops)
    assert proposal["groups"] == 30 and proposal["largest"] == 4
    assert len(set(data.groups_of(crops, proposal["group_regex"]))) == 30
    assert audit.propose_groups([f"train/good/{n:04d}.png" for n in range(100)]) is None
    assert audit.propose_groups([f"train/good/img_{n:04d}.png" for n in range(100)]) is None


def test_test_pictures_in_training_stop_it_unless_allowed_or_dropped(tmp_path, monkeypatch, capfd):
    parts = make_set(tmp_path / "parts", {"train": 8, "val": 3, "test": 4})
    copied = parts / "train" / "level" / "copy.png"
    copied.write_bytes((parts / "test" / "level" / "l000.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    words = ("--data-dir", "parts", "--view-size", 32, "--model", "test_resnet", "--epochs", 1, "--device", "cpu")
    assert call(train_teacher.main, *words) == 2
    error = capfd.readouterr().err
    assert "1 test pictures are among the training pictures" in error and "--drop-leaks" in error and not (tmp_path / "runs" / "test_resnet").exists()
    assert call(train_teacher.main, *words, "--allow-leakage") == 0
    assert call(train_teacher.main, *words, "--drop-leaks", "--overwrite") == 0
    record = load(tmp_path / "runs" / "test_resnet" / "best.pt")["data"]
    assert record["dropped"] == ["train/level/copy.png"]
    train, _, _ = data.open_training_data(record, argparse.Namespace(cache_dir="runs/packs", workers=1, skip_bad=False))
    assert len(train) == 24 and "train/level/copy.png" not in [train.path(i) for i in range(24)]
    copied.unlink()  # now there is nothing to drop, so what a later stage finds is no longer what the teacher saw
    with pytest.raises(UserError, match="differs"):
        data.open_training_data(record, argparse.Namespace(cache_dir="runs/packs", workers=1, skip_bad=False))


def test_labels_that_all_teachers_reject_are_ranked_by_doubt():
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    first = np.array([[.9, .1], [.8, .2], [.1, .9], [.2, .8], [.1, .9], [.55, .45], [.7, .3]])
    second = np.array([[.9, .1], [.7, .3], [.05, .95], [.1, .9], [.1, .9], [.45, .55], [.6, .4]])
    found = audit.suspicious_labels([first, second], labels)
    assert [(s["row"], s["suggested"]) for s in found] == [(2, 1), (6, 0)]  # the teachers disagree about row 5
    assert [s["probability"] for s in found] == pytest.approx([0.925, 0.65])
    assert audit.suspicious_labels([], labels) == []


def test_neighbours_outvote_a_wrong_label_but_not_a_rare_class():
    centres = torch.eye(3).repeat_interleave(torch.tensor([40, 40, 4]), 0)
    features = centres + 0.1 * torch.rand(84, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 4)
    labels[5], labels[50] = 1, 0
    votes = audit.neighbour_votes(features, labels, 3)
    assert torch.allclose(votes.sum(1), torch.ones(84))
    found = audit.suspicious_labels([votes.numpy()], labels.numpy())
    assert {(s["row"], s["suggested"]) for s in found} == {(5, 0), (50, 1)}


def test_the_ensemble_lists_the_labels_it_doubts_by_path(tiny):
    record = load_ensemble(tiny.runs / "ensemble")
    assert set(record["suspicions"]) == {"train", "val"}
    for name, found in record["suspicions"].items():
        for s in found:
            assert s["picture"].startswith("train/") and s["label"] != s["suggested"]  # val is held out of train here


def test_a_pool_beside_the_data_folder_is_audited_too(tmp_path, monkeypatch, capfd):
    parts = make_set(tmp_path / "parts", {"train": 8, "val": 3, "test": 4})
    pool = make_set(tmp_path / "elsewhere", {"unlabelled": 5}, seed=1) / "unlabelled"
    (pool / "copy.png").write_bytes((parts / "test" / "level" / "l000.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    device = ("--device", "cpu")
    assert call(train_teacher.main, "--data-dir", "parts", "--view-size", 32, "--model", "test_resnet", "--epochs", 1, *device) == 0
    capfd.readouterr()
    assert call(build_ensemble.main, "--views", 1, "--unlabelled", pool, *device) == 0
    assert "1 of 12 pictures of test are byte for byte in unlabelled: test/level/l000.png = unlabelled/copy.png" in capfd.readouterr().out
