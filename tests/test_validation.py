"""Validation that can be believed: what is held out, near-duplicates, weights that are fitted."""

import numpy as np
import pytest
from conftest import CPU, call, make_set
from PIL import Image, ImageEnhance, ImageOps

import build_ensemble
import distill
import train_teacher
from common import splits, validation
from common.files import UserError
from common.models import load_checkpoint
from common.pictures import WHITE_LEVEL, DecodedCache

CLASSES = ["cross", "level", "upright"]


def twin(source, target):
    """A picture mirrored, brightened and encoded again."""
    with Image.open(source) as picture:
        ImageEnhance.Brightness(ImageOps.mirror(picture)).enhance(1.1).save(target, quality=92)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A set in which every training picture has a twin: 16 pictures in 8 pairs in each class."""
    folder = make_set(tmp_path / "parts", {"train": 8, "test": 2})
    for file in sorted((folder / "train").rglob("*.png")):
        twin(file, file.with_name(f"z{file.stem}.jpg"))
    monkeypatch.chdir(tmp_path)
    return folder


def open_training(folder, **changes):
    """`splits.open_training` of a folder without val/, half of which is held out."""
    dataset = {
        "dir": str(folder), "view_size": [48, 64], "white_level": WHITE_LEVEL, "val_fraction": 0.5,
        "group_regex": None, "dropped": [],
    }
    return splits.open_training(DecodedCache("runs/decoded"), {**dataset, **changes})


def pairs_of(pictures):
    """The names that twins share."""
    return {path.split("/")[-1].split(".")[0].removeprefix("z") for path in pictures.paths()}


# ------------------------------------------------------------------------------ what is held out


def test_each_class_gives_its_share_and_the_same_pictures_each_time():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    names = [str(i) for i in range(160)]
    val = validation.draw(labels, names, 0.2)
    assert list(np.bincount(labels[val])) == [20, 10, 2]
    assert list(val) == list(validation.draw(labels, names, 0.2))
    assert list(val) != list(validation.draw(labels, names, 0.2, seed=1))


def test_groups_stay_whole():
    paths = []
    for photo in range(40):
        paths += [f"{'hole' if k % 3 else 'screw'}/{photo}_{k}.jpg" for k in range(4)]
    labels = np.array([path.startswith("screw") for path in paths], int)
    groups = [validation.part_of(path, r"/(\d+)_") for path in paths]
    val = validation.draw(labels, groups, 0.25)
    train = np.setdiff1d(np.arange(160), val)
    assert not {groups[i] for i in train} & {groups[i] for i in val}
    assert len(val) == 40 and np.bincount(labels[val]).tolist() == [20, 20]


def test_links_join_groups_whatever_their_order():
    names = ["a", "a", "b", "c", "d", "e"]
    one, *rest = validation.joined(names, [(3, 2), (4, 0), (2, 1)])
    assert rest[:4] == [one] * 4 and rest[4] == "e"


def test_twins_stay_on_one_side_and_a_line_says_so(parts, capfd):
    train, val, dataset = open_training(parts)
    assert len(train) == len(val) == 24
    assert not pairs_of(train) & pairs_of(val)
    said = capfd.readouterr().out
    assert "48 of 48 pictures of train hang together as near-duplicates" in said
    assert "in 24 clusters of up to 2" in said and "warning" not in said
    assert dataset["held_out"] == val.paths()


def test_shots_of_a_burst_stay_on_one_side_though_each_is_linked_to_its_likest_alone(
    tmp_path, capfd
):
    # By name the outer shots come first, 16 px from each other, too far to be linked; the third,
    # between them, is linked to one of the two.
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for burst in range(10):
            coarse = Image.fromarray(rng.normal(128, 50, (5, 5)).astype(np.float32))
            scene = np.asarray(coarse.resize((160, 160), Image.BICUBIC))
            scene = (scene + rng.normal(0, 25, scene.shape)).clip(0, 255).astype(np.uint8)
            for number, shift in enumerate((0, 16, 8)):
                shot = Image.fromarray(scene[:128, shift:shift + 128])
                shot.save(tmp_path / "train" / name / f"{burst}_{number}.png")
    cache = DecodedCache(tmp_path / "decoded")
    split = {"dir": tmp_path, "val_fraction": 0.34, "group_regex": None, "dropped": []}
    train, val, _ = splits.open_training(
        cache, {**split, "view_size": [128, 128], "white_level": WHITE_LEVEL})
    sides = [{path.rsplit("_", 1)[0] for path in each.paths()} for each in (train, val)]
    assert len(val) == 18 and not sides[0] & sides[1]
    assert "near-duplicates on two sides, which are drawn again" in capfd.readouterr().out


def test_a_split_that_the_last_search_has_changed_is_not_called_honest(parts, monkeypatch, capfd):
    monkeypatch.setattr(validation, "ROUNDS", 1)
    monkeypatch.setattr(validation, "across", lambda home, train, val: [(0, 1)])
    open_training(parts)
    said = capfd.readouterr().out
    assert "warning: near-duplicates may be on two sides still, after 1 searches" in said


def test_twins_and_named_groups_are_joined(parts, capfd):
    train, val, _ = open_training(parts, group_regex=r"/z?[clu]00(\d)")
    number_of = [{name[-1] for name in pairs_of(side)} for side in (train, val)]
    assert not set.intersection(*number_of) and len(set.union(*number_of)) == 8
    assert "near-duplicates" not in capfd.readouterr().out  # the groups held all of them already


def test_a_group_that_took_no_part_in_the_match_names_no_part():
    paths, either = ["good/3_1.png", "good/part5_2.png"], r"/(\d+)_|/part(\d+)_"
    assert [validation.part_of(path, either) for path in paths] == ["3", None]


def test_a_promise_that_rests_on_twins_is_named(parts, capfd):
    _, val, dataset = open_training(parts)
    metadata = {"operating_point": {"goal": "miss"}, "good_classes": ["level"], "classes": CLASSES}
    decoded = DecodedCache("runs/decoded")
    capfd.readouterr()
    distill.warn_of_repeats(decoded, val, dataset, metadata)
    assert "of 16 validation defects only 8 are no near-duplicates" in capfd.readouterr().out
    as_parts = {**dataset, "group_regex": r"z?([clu]00\d)"}
    distill.warn_of_repeats(decoded, val, as_parts, metadata)
    assert "warning" not in capfd.readouterr().out


def test_the_split_does_not_depend_on_the_size_of_the_views(parts):
    split = [open_training(parts, view_size=size)[1].paths() for size in ([32, 32], [64, 96])]
    assert split[0] == split[1]


def test_later_stages_have_the_split_that_was_drawn(parts, monkeypatch):
    _, val, dataset = open_training(parts)
    monkeypatch.setattr(validation.near_duplicates, "near_duplicates", None)  # would fail
    for file in (parts.parent / "runs" / "decoded").glob("copies-*.json"):
        file.unlink()
    _, again, _ = splits.open_training(DecodedCache("runs/decoded"), dataset)
    assert again.paths() == val.paths()


def test_a_second_start_does_not_search_again(parts, monkeypatch):
    _, val, _ = open_training(parts)
    monkeypatch.setattr(validation.near_duplicates, "near_duplicates", None)  # would fail
    assert open_training(parts)[1].paths() == val.paths()


def test_a_cluster_of_much_of_a_class_is_named_with_two_pictures_and_stays_whole(parts, capfd):
    level = parts / "train" / "level"
    for number in range(1, 6):
        (level / f"l00{number}.png").unlink()
        twin(level / "l000.png", level / f"zl00{number}.jpg")
    train, val, _ = open_training(parts)
    said = capfd.readouterr().out
    assert "warning: 7 of 11 pictures of level are one cluster" in said
    assert "train/level/l000.png and train/level/zl005.jpg among them" in said
    sides = [sum("level/zl00" in path for path in side.paths() if path < "train/level/zl006")
             for side in (train, val)]
    assert sorted(sides) == [0, 6]


def test_where_a_class_is_one_cluster_the_split_is_drawn_without_and_a_warning_says_so(
    parts, capfd
):
    level = parts / "train" / "level"
    for file in level.iterdir():
        if file.name != "l000.png":
            file.unlink()
    for number in range(5):
        twin(level / "l000.png", level / f"zl00{number}.jpg")
    train, val, _ = open_training(parts)
    assert "near-duplicates leave no honest split of level" in capfd.readouterr().out
    assert all(side.labels.bincount(minlength=3)[1] == 3 for side in (train, val))


def test_too_many_pictures_to_compare_are_split_with_a_warning(parts, monkeypatch, capfd):
    monkeypatch.setattr(validation, "MOST", 47)
    train, val, _ = open_training(parts)
    assert "no search for near-duplicates among 48 pictures, more than 47" in capfd.readouterr().out
    assert pairs_of(train) & pairs_of(val)  # twins on both sides


def test_a_class_that_cannot_be_split_is_refused_by_name(tmp_path, monkeypatch):
    parts = make_set(tmp_path / "parts", {"train": 3})
    for file in sorted((parts / "train" / "level").iterdir())[1:]:
        file.unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^level: too few pictures"):
        open_training(parts)


# ------------------------------------------------------------------------------ a val/ of one's own


def test_near_duplicates_of_val_are_counted_and_dropped_from_training(tmp_path, monkeypatch, capfd):
    parts = make_set(tmp_path / "parts", {"train": 6, "val": 3})
    for number in range(2):
        twin(parts / "val" / "level" / "l000.png", parts / "train" / "level" / f"z{number}.jpg")
    twin(parts / "val" / "cross" / "c001.png", parts / "train" / "cross" / "z0.jpg")
    for file in (parts / "val").rglob("*.png"):  # of another size than those of train/
        with Image.open(file) as picture:
            picture.resize((60, 50)).save(file)
    monkeypatch.chdir(tmp_path)
    words = ("--data-dir", "parts", "--view-size", "48x64", "--model", "test_resnet", "--steps", 1)
    assert call(train_teacher.main, *words, *CPU) == 0
    said = capfd.readouterr().out
    assert "3 training pictures may be near-duplicates of 2 of 9 validation pictures" in said
    assert "--drop-leaks" in said and "21 training and 9" in said
    assert call(train_teacher.main, *words, "--drop-leaks", "--overwrite", *CPU) == 0
    assert "18 training and 9 validation pictures" in capfd.readouterr().out
    dataset = load_checkpoint(tmp_path / "runs" / "test_resnet" / "model.pt")["dataset"]
    names = ("cross/z0", "level/z0", "level/z1")
    assert dataset["dropped"] == [f"train/{name}.jpg" for name in names]


def test_near_duplicates_of_validation_in_the_pool_are_counted_and_left_out(
    tmp_path, monkeypatch, capfd
):
    parts = make_set(tmp_path / "parts", {"train": 6, "val": 3, "unlabelled": 4})
    for number in range(2):
        twin(parts / "val" / "level" / "l000.png", parts / "unlabelled" / f"z{number}.jpg")
    monkeypatch.chdir(tmp_path)
    words = ("--data-dir", "parts", "--view-size", "48x64", "--model", "test_resnet", "--steps", 1)
    assert call(train_teacher.main, *words, *CPU) == 0
    assert call(build_ensemble.main, "--views", 1, *CPU) == 0
    said = capfd.readouterr().out
    assert "2 unlabelled pictures may be near-duplicates of 1 of 9 validation pictures" in said
    assert "32 pictures, 1 views" in said
    assert call(build_ensemble.main, "--views", 1, "--drop-leaks", "--overwrite", *CPU) == 0
    assert "30 pictures, 1 views" in capfd.readouterr().out
