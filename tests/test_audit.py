"""The audit: what is planted is found, what merely looks alike is not."""

import io

import numpy as np
import pytest
import torch
from conftest import CPU, DATASET, call
from PIL import Image, ImageEnhance

import build_ensemble
import evaluate
from common import splits, validation
from common.audit import label_errors as errors
from common.audit import near_duplicates as near
from common.audit.audit import audit, audit_lines, find_copies, propose_groups
from common.audit.shortcuts import discriminant
from common.fasteners.drawing import CLASSES, draw
from common.pictures import DecodedCache

CHANGES = {
    "encoded again": lambda im: encoded(im, "JPEG", quality=75),
    "resized": lambda im: im.resize((im.width * 2 // 3, im.height * 2 // 3)),
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
    """24 training pictures; 12 new test pictures and a changed copy of six training ones."""
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


def sets_of(root, size=128):
    cache, dataset = DecodedCache(root / "decoded"), {**DATASET, "view_size": [size, size]}
    opened = {name: splits.open_labelled(cache, root / name, dataset) for name in ("train", "test")}
    return {name: pictures for name, (_, pictures) in opened.items()}


def copies_in(sets):
    found = find_copies(sets, sum(list(sets.values())[1:], start=sets["train"]))
    return found["copies"], found["conflicts"]


def audited(root, classes, size=128, group_regex=None):
    cache, dataset = DecodedCache(root / "decoded"), {**DATASET, "view_size": [size, size]}
    dataset["group_regex"] = group_regex
    return "\n".join(audit_lines(audit(cache, dataset, sets_of(root, size)), classes))


def test_changed_copies_are_found_and_parts_that_look_alike_are_not(planted):
    copies, conflicts = copies_in(sets_of(planted))
    pairs = {(copy["picture"][-7:-4], copy["of"][-7:-4]) for copy in copies}
    assert pairs == {(f"{100 + n}", f"{n:03d}") for n in range(6)}
    assert {c["kind"] for c in copies} == {"near"} and not conflicts


def test_near_duplicates_are_found_within_a_set_too(planted):
    pictures = sets_of(planted)["train"] + sets_of(planted)["test"]
    across = near.near_duplicates(pictures, np.repeat([0, 24], [24, 18]))
    within = near.near_duplicates(pictures, np.arange(42))
    assert len(across) == 6
    assert [pair[:2] for pair in within] == [pair[:2] for pair in across]


@pytest.mark.parametrize("side, words", [
    (144, "of test are near-duplicates of"),
    (64, "of test are perhaps near-duplicates (at 64 px"),
])
def test_near_duplicates_are_perhaps_so_where_pictures_not_views_are_small(
    planted, tmp_path, side, words
):
    for file in planted.rglob("*.png"):
        copy = tmp_path / file.relative_to(planted)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((side, side)).save(copy)
    assert words in audited(tmp_path, CLASSES, 48)


def test_a_flat_view_shows_less_detail_than_a_square_of_as_many_pixels():
    assert near.likeness_of_copies([128, 128]) == near.likeness_of_copies([120, 300]) == 0.60
    assert near.likeness_of_copies([80, 208]) == near.likeness_of_copies([64, 64]) == 0.70


def test_parts_that_repeat_themselves_are_no_copies_of_one_another():
    # Two threads of one pitch, each with grain of its own: 0.86 where spectra are not whitened.
    turns = 60 * np.sin(np.arange(128))[:, None] + 120
    grain = np.random.default_rng(0).normal(0, 8, (2, 128, 128))
    a, b = torch.from_numpy(turns + grain).float()[:, None]
    assert near.likeness(a, b) < 0.3 and near.likeness(a, 1.2 * a + 5) > 0.95


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
    copies, conflicts = copies_in(sets_of(tmp_path))
    kinds = {copy["picture"]: copy["kind"] for copy in copies}
    assert kinds == {"test/bent/same_bytes.png": "bytes", "test/rusted/same_pixels.bmp": "pixels"}
    (conflict,) = conflicts
    assert conflict["set"] == "train" and conflict["picture"] == "train/rusted/twin.png"
    assert conflict["of"] == f"train/bent/{file.name}"
    text = audited(tmp_path, CLASSES)
    assert "1 of 8 pictures of test are byte for byte in train" in text
    assert "different labels" in text


def test_descriptors_do_not_change_with_symmetry_brightness_and_contrast():
    thumbnails = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = near.descriptors(thumbnails)
    for turned in near.symmetries(thumbnails):
        assert torch.allclose(near.descriptors(3 * turned + 7), expected, atol=1e-5)
    assert (expected @ expected.T - torch.eye(5)).max() < 0.999


def test_likeness_is_one_for_equal_detail_and_low_for_other_detail():
    noise = 255 * torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    paler = near.likeness(noise[0], 0.5 * noise[0] + 30)
    assert torch.allclose(paler, torch.ones(4), atol=1e-2)
    shifted = torch.roll(noise[0], (3, -2), (1, 2))
    assert near.likeness(noise[0], shifted).min() > 0.8
    assert near.likeness(noise[0], noise[1]).max() < 0.3


def test_the_discriminant_sees_through_a_large_class():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [450, 50])
    x = (labels + rng.normal(0, 0.7, 500))[:, None]
    answer = discriminant(x, labels, x).argmax(1)
    recalls = [(answer[labels == c] == c).mean() for c in (0, 1)]
    assert min(recalls) > 0.65  # unbalanced, the small class would be missed


def test_a_property_that_grows_from_class_to_class_is_a_shortcut_too():
    labels = np.repeat(range(6), 20)
    x = np.random.default_rng(0).normal(40 + 25 * labels, 3)[:, None]
    assert (discriminant(x, labels, x).argmax(1) == labels).mean() > 0.99


def test_what_never_varies_in_training_decides_nothing():
    labels = np.repeat([0, 1], [500, 100])
    x = np.c_[labels, np.full(600, 640 / 480)]
    others = np.c_[labels, np.full(600, 1280 / 720)]  # of another camera
    assert (discriminant(x, labels, others).argmax(1) == labels).all()


def test_group_proposals_follow_file_names():
    crops = [f"train/hole/{photo}_{part}.jpg" for photo in range(30) for part in range(4)]
    proposal = propose_groups(crops)
    assert proposal["groups"] == 30 and proposal["largest"] == 4
    assert len({validation.part_of(crop, proposal["group_regex"]) for crop in crops}) == 30
    for name in ("", "img_"):
        assert propose_groups([f"train/good/{name}{n:04d}.png" for n in range(100)]) is None


def test_a_shortcut_and_a_small_class_are_named(tmp_path):
    for number in range(24):  # one class photographed under red light
        good, image = number % 2, np.asarray(picture(number)).copy()
        image[..., 0] = image[..., 0] // 2 + 120 * good
        folder = tmp_path / ("train" if number < 16 else "test")
        put(folder, number, Image.fromarray(image), "good" if good else "bad")
    text = audited(tmp_path, ["bad", "good"])
    assert "shortcut: mean colour alone gives 100 % balanced accuracy on test" in text
    assert "test: fewer than 10 pictures of bad (4), good (4)" in text


def test_parts_that_training_shows_and_repeats_within_a_test_set_are_named(tmp_path):
    for number in range(12):
        put(tmp_path / "train", number, picture(number))
        put(tmp_path / "test", number + 11, picture(number + 20))  # 11 is a part of train
    for twin in (50, 51):
        put(tmp_path / "test", twin, picture(20), CLASSES[5])
    text = audited(tmp_path, CLASSES, group_regex=r"/(\d+)")
    assert "1 pictures of test show parts that training shows, by --group-regex: test/" in text
    assert "2 of 14 pictures of test repeat others of it, so its intervals are too narrow" in text
    text = audited(tmp_path, CLASSES, group_regex=r"train(\d+)")
    assert "--group-regex matches no picture of test, so each counts alone" in text


def test_labels_that_all_teachers_reject_are_ranked_the_surest_first():
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    p = [0.9, 0.8, 0.1, 0.2, 0.1, 0.55, 0.7]  # of class 0
    q = [0.9, 0.7, 0.05, 0.1, 0.1, 0.45, 0.6]
    answers = [np.array([[v, 1 - v] for v in values]) for values in (p, q)]
    ranked = errors.label_errors(answers, labels)
    # The teachers disagree about row 5.
    assert [(error["row"], error["suggested"]) for error in ranked] == [(2, 1), (6, 0)]
    assert [error["probability"] for error in ranked] == pytest.approx([0.925, 0.65])
    assert errors.label_errors([], labels) == []


def test_stored_label_errors_are_left_out_where_the_pictures_are_others(planted):
    sets = sets_of(planted)
    here = [{"row": 2, "picture": sets["train"].path(2)}]
    elsewhere = [{"row": 99, "picture": "val/good/002.png"}]
    stored = [{"train": here}, {"test": elsewhere, "val": here}]
    assert errors.label_errors_of_sets(stored, sets, {}, {}) == {"train": here}
    answers = {"test": [np.eye(6)[np.zeros(len(sets["test"]), int)]]}
    (of_test,) = errors.label_errors_of_sets([], sets, {"test": sets["test"]}, answers).values()
    assert len(of_test) == (sets["test"].labels != 0).sum()
    assert of_test[0]["picture"] == sets["test"].path(of_test[0]["row"])


def test_neighbours_outvote_a_wrong_label_but_not_a_rare_class():
    centres = torch.eye(3).repeat_interleave(torch.tensor([40, 40, 4]), 0)
    features = centres + 0.1 * torch.rand(84, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 4)
    labels[5], labels[50] = 1, 0
    votes = errors.neighbour_votes(features, labels, 3)
    assert torch.allclose(votes.sum(1), torch.ones(84))
    named = errors.label_errors([votes.numpy()], labels.numpy())
    assert {(error["row"], error["suggested"]) for error in named} == {(5, 0), (50, 1)}


def test_among_many_pictures_a_sample_votes_and_nobody_votes_for_itself(monkeypatch):
    monkeypatch.setattr(errors, "REFERENCES", 60)
    centres = torch.eye(2).repeat_interleave(100, 0)
    features = centres + 0.1 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 100 + [1] * 100)
    wrong = torch.arange(0, 200, 20)
    labels[wrong] = 1 - labels[wrong]
    votes = errors.neighbour_votes(features, labels, 2)
    assert votes.argmax(1).tolist() == [0] * 100 + [1] * 100


def test_the_pool_and_test_sets_of_any_name_are_audited(inside, tmp_path, capfd):
    copy = inside.data / "unlabelled" / "z_copy.png"
    copy.write_bytes((inside.data / "test" / "level" / "l000.png").read_bytes())
    try:
        words = ("--views", 1, "--allow-leakage", "--output", tmp_path / "e")
        assert call(build_ensemble.main, *words, *CPU) == 0
        words = ("--test-dirs", "parts/test", "parts/train", "--output", tmp_path / "r")
        assert call(evaluate.main, tmp_path / "e", *words, *CPU) == 0
    finally:
        copy.unlink()
    printed = capfd.readouterr().out
    assert "1 of 60 pictures of test are byte for byte in unlabelled" in printed
    # A test set of that name does not take the place of the training pictures.
    assert "57 of 72 pictures of parts/train are byte for byte in train" in printed


def test_one_line_names_three_of_hundreds_of_classes():
    findings = {"compared_at": [128, 128], "copies": [], "conflicts": [], "groups": None,
                "repeats": {}, "parts": {}, "sizes": {}, "shortcuts": {},
                "per_class": {"test": [5] * 300}}
    (line,) = audit_lines(findings, [f"class {k}" for k in range(300)])
    assert "class 0 (5), class 1 (5), class 2 (5) and 297 more" in line

    pair = {"picture": "a", "of": "b", "set": "train", "of_set": "train", "labels": [0, 1],
            "kind": "pixels"}
    findings |= {"conflicts": [pair] * 200, "per_class": {}}
    assert audit_lines(findings, ["x", "y"])[-1] == "and 194 more pairs with different labels"
