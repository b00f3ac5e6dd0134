"""Reading pictures: every kind is read, every bad one is named, and nothing stale is served."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, DATASET, SIZE, VIEW_SIZE, call, make_set, read_picture
from PIL import Image

import build_ensemble
import distill
import infer
import train_teacher
from common import pictures, splits, training
from common.ensemble import load_ensemble
from common.files import UserError
from common.models import load_checkpoint
from common.pictures import DecodedCache

RED, GREEN = (200, 30, 40), (20, 180, 60)


def two_halves(size=(40, 20)):
    """RGB picture, left half red and right half green."""
    picture = Image.new("RGB", size, RED)
    picture.paste(GREEN, (size[0] // 2, 0, *size))
    return picture


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("mode, kind", [
    ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"), ("RGB", "BMP"), ("P", "GIF"),
])
def test_colour_pictures_of_every_mode_keep_their_colours(mode, kind):
    converted = two_halves().convert(mode, palette=Image.Palette.ADAPTIVE)
    pixels = read_picture(saved(converted, kind)).astype(int)
    assert pixels.shape == (20, 40, 3)
    assert np.abs(pixels[5, 5] - RED).max() <= 30 and np.abs(pixels[5, 35] - GREEN).max() <= 30


def test_grey_and_16_bit_pictures_keep_their_brightness_whatever_else_is_in_them():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(8, 0)
    grey = read_picture(saved(Image.fromarray(ramp), "PNG"))
    deep = read_picture(saved(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG"))
    assert (grey == ramp[..., None]).all() and (deep == grey).all()
    dark = saved(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG")  # of 65535
    assert read_picture(dark).max() == 0


def test_a_12_bit_camera_is_warned_of_and_read_with_its_white_level(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    for number, brightest in enumerate((900, 4095)):  # a dark picture stays darker than a bright
        values = np.linspace(0, brightest, 64).astype(np.uint16)[None].repeat(64, 0)
        Image.fromarray(values).save(tmp_path / "deep" / f"{number}.png")
    cache = DecodedCache(tmp_path / "decoded")
    assert cache.open(tmp_path / "deep", [64, 64]).images.max() == 15
    assert "--white-level 4095" in capsys.readouterr().out
    decoded = cache.open(tmp_path / "deep", [64, 64], white_level=4095)
    assert [int(image.max()) for image in decoded.images] == [56, 255]
    assert "--white-level" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    pixels = read_picture(saved(two_halves(), kind, exif=exif))
    assert pixels.shape == (40, 20, 3)
    assert pixels[5, 10, 0] > 150 and pixels[35, 10, 1] > 150  # red above, green below


def test_infer_resizes_to_the_very_bytes_that_training_sees():
    rng = np.random.default_rng(0)
    for height, width, *size in (
        (40, 48, 32, 32), (480, 640, 64, 64), (7, 3000, 70, 70), (1, 1, 32, 32), (64, 64, 64, 64),
        (333, 64, 64, 64), (2000, 999, 224, 224), (31, 130, 128, 128), (260, 640, 80, 208),
        (96, 240, 96, 64), (64, 40, 64, 33), (50, 40, 208, 40),
    ):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for picture in (noise, noise.max(0, keepdims=True).repeat(height, 0), noise | 255):
            ours = pictures.resize(torch.from_numpy(picture), size).numpy()
            assert (infer.resize(picture, size) == ours).all(), (height, width, size)


def test_every_bad_picture_is_named_and_skip_bad_leaves_them_out(tmp_path, capsys, monkeypatch):
    root = make_set(tmp_path / "s", {"train": 4}) / "train"
    good = (root / "level" / "l000.png").read_bytes()
    (root / "level" / "l001.png").write_bytes(b"")
    (root / "cross" / "c002.png").write_bytes(good[: len(good) // 2])
    (root / "upright" / "note.jpg").write_text("not a picture")
    Image.new("L", (200, 200)).save(root / "upright" / "big.png")
    monkeypatch.setattr(infer, "MAX_PIXELS", 30_000)
    with pytest.raises(UserError) as error:
        splits.open_labelled(DecodedCache(tmp_path / "decoded"), root, DATASET)
    for words in ("l001.png: the file is empty", "c002.png", "note.jpg", "big.png: ValueError"):
        assert words in str(error.value)

    lenient = DecodedCache(tmp_path / "decoded", skip_bad=True)
    classes, readable = splits.open_labelled(lenient, root, DATASET)
    assert "4 pictures cannot be read and are left out" in capsys.readouterr().out
    assert readable.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    last = root.parent / readable.path(9)
    expected = pictures.resize(torch.from_numpy(read_picture(last)), SIZE)
    assert (readable.batch([9])[0] == expected).all()


def test_a_changed_byte_makes_the_cache_again_and_a_changed_time_does_not(tmp_path, cache, capsys):
    root = make_set(tmp_path / "s", {"train": 3}) / "train"
    file = root / "level" / "l000.png"
    first = cache.open(root, [16, 16])
    assert "decoded" in capsys.readouterr().out
    os.utime(file, (1, 1))
    assert cache.open(root, [16, 16]).fingerprint == first.fingerprint
    assert "decoded" not in capsys.readouterr().out
    before, changed = file.stat(), bytearray(file.read_bytes())
    changed[-1] ^= 1  # the end chunk's checksum, which Pillow does not read: same size and pixels
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = cache.open(root, [16, 16])
    assert "decoded" in capsys.readouterr().out and second.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["cut", "one bit", "another array"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, damage):
    root = make_set(tmp_path / "s", {"train": 3}) / "train"
    expected = np.array(cache.open(root, [16, 16]).images)
    file = next((tmp_path / "decoded").glob("*/images.bin"))
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[-100:]
    elif damage == "one bit":
        content[500] ^= 1
    else:
        content = bytes(len(content))
    file.write_bytes(content)
    assert (cache.open(root, [16, 16]).images == expected).all()


def test_resize_never_crops():
    picture = torch.zeros(30, 90, 3, dtype=torch.uint8)
    picture[:, :3] = 255  # a bright left edge
    small = pictures.resize(picture, [30, 30])
    assert small.shape == (30, 30, 3) and small[:, 0].min() > 200 and small[:, 2:].max() == 0


@pytest.mark.parametrize("width, height, turned, size", [
    (100, 100, False, [96, 96]), (49, 49, False, [48, 48]), (500, 500, False, [128, 128]),
    (640, 260, False, [80, 208]), (260, 640, False, [208, 80]), (640, 260, True, [208, 80]),
    (640, 480, False, [112, 144]), (100, 60, False, [48, 96]), (20, 8, False, [32, 32]),
    (6000, 40, False, [32, 1568]),
])
def test_default_view_size_keeps_the_shape_at_the_pixels_of_128_x_128(
    tmp_path, width, height, turned, size
):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    for kind in ("jpg", "tif"):
        for c in "ab":
            folder = tmp_path / kind / "train" / c
            folder.mkdir(parents=True)
            Image.new("L", (width, height)).save(folder / f"x.{kind}", exif=exif)
        assert train_teacher.default_view_size(tmp_path / kind) == size


def test_views_say_what_they_lose_and_whom_they_squeeze():
    sizes = [(640, 260, 9)] * 8 + [(260, 640, 9)] * 2 + [(640, 640, 9)]
    lost, squeezed = train_teacher.size_lines(sizes, [80, 208])
    assert "640 x 260 px (median) are reduced to 208 x 80: a defect under 10 px" in lost
    assert squeezed.startswith("3 of 11 pictures have another shape than the views")
    (whole,) = train_teacher.size_lines(sizes[:1], [260, 640])
    assert "640 x 260 px (median) are not reduced" in whole


def test_a_class_with_few_pictures_is_named_with_what_helps(capsys):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)
    training.say_rare(labels, ["good", "hole", "rust"])
    line = capsys.readouterr().out
    assert line.startswith("of rust there are 10 training pictures, of good 40; --balance-classes")
    training.say_rare(labels[:-10], ["good", "hole"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000])
def test_a_foreign_index_makes_the_cache_again(tmp_path, cache, content):
    root = make_set(tmp_path / "s", {"train": 3}) / "train"
    expected = np.array(cache.open(root, [16, 16]).images)
    next((tmp_path / "decoded").glob("*/index.json")).write_bytes(content)
    assert (cache.open(root, [16, 16]).images == expected).all()


# ------------------------------------------------------------------------------------------ splits


def test_a_class_folder_whose_name_begins_with_a_dot_is_left_out_with_one_line(
        tmp_path, cache, capfd):
    root = make_set(tmp_path / "s", {"train": 3}) / "train"
    (root / ".git").mkdir()  # holds no picture
    shutil.copytree(root / "level", root / ".bent")
    for _ in range(2):
        classes, _ = splits.open_labelled(cache, root, DATASET)
        assert classes == ["cross", "level", "upright"]
    said = capfd.readouterr().out
    assert said.count("left out the folder .bent") == 1 and ".git" not in said


def test_test_pictures_in_training_stop_it_unless_allowed_or_dropped(tmp_path, monkeypatch, capfd):
    parts = make_set(tmp_path / "parts", {"train": 8, "val": 3, "test": 4})
    original = parts / "test" / "level" / "l000.png"
    (parts / "train" / "level" / "bytes.png").write_bytes(original.read_bytes())
    with Image.open(original) as image:
        image.save(parts / "train" / "level" / "pixels.bmp")
    shutil.copy(parts / "test" / "upright" / "u000.png", parts / "val" / "upright" / "x.png")
    monkeypatch.chdir(tmp_path)
    words = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_resnet",
             "--steps", 2)
    assert call(train_teacher.main, *words, *CPU) == 2
    error = capfd.readouterr().err
    assert "3 training or validation pictures are test pictures too" in error
    assert "--drop-leaks" in error
    assert not (tmp_path / "runs" / "test_resnet").exists()
    assert call(train_teacher.main, *words, "--allow-leakage", *CPU) == 0
    assert call(train_teacher.main, *words, "--drop-leaks", "--overwrite", *CPU) == 0

    dataset = load_checkpoint(tmp_path / "runs" / "test_resnet" / "model.pt")["dataset"]
    assert dataset["dropped"] == [
        "train/level/bytes.png", "train/level/pixels.bmp", "val/upright/x.png"
    ]
    train, _, _ = splits.open_training(DecodedCache("runs/decoded"), dataset)
    assert len(train) == 24 and not set(train.paths()) & set(dataset["dropped"])
    (parts / "train" / "level" / "bytes.png").unlink()  # a later stage finds other pictures
    with pytest.raises(UserError, match="added, removed or changed"):
        splits.open_training(DecodedCache("runs/decoded"), dataset)


def test_unlabelled_copies_of_test_and_validation_pictures_stop_an_ensemble_or_are_dropped(
    inside, tmp_path, capfd
):
    pool = tmp_path / "pool"
    shutil.copytree("parts/unlabelled", pool)
    shutil.copy("parts/test/level/l000.png", pool / "x.png")
    with Image.open("parts/test_other/cross/c001.png") as image:
        image.save(pool / "y.bmp")
    held_out = load_ensemble("runs/ensemble")["dataset"]["held_out"]
    shutil.copy(inside.data / held_out[0], pool / "z.png")
    words = ("--unlabelled", pool, "--views", 1, "--output", tmp_path / "e", *CPU)
    assert call(build_ensemble.main, *words) == 2
    error = capfd.readouterr().err
    assert "3 unlabelled pictures are test or validation pictures too" in error
    assert not (tmp_path / "e").exists()
    assert call(build_ensemble.main, *words, "--allow-leakage") == 0
    assert load_ensemble(tmp_path / "e")["pictures"] == 57 + 51
    assert call(build_ensemble.main, *words, "--drop-leaks", "--overwrite") == 0
    spec = load_ensemble(tmp_path / "e")
    assert spec["pictures"] == 57 + 48
    assert spec["unlabelled"]["dropped"] == ["pool/x.png", "pool/y.bmp", "pool/z.png"]
    pool.rename(tmp_path / "elsewhere")  # a folder's name is no part of a picture's
    words = ("--steps", 2, "-b", 16, "--unlabelled", tmp_path / "elsewhere", *CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "export_student", lambda *_: None)
        assert call(distill.main, tmp_path / "e", *words, "--output", tmp_path / "s") == 0
    assert "57 labelled and 48 unlabelled pictures" in capfd.readouterr().out


def test_a_test_folder_that_evaluate_will_refuse_never_stops_training(tmp_path, monkeypatch):
    parts = make_set(tmp_path / "parts", {"train": 8, "val": 3, "test_of_few": 2})
    (parts / "test_empty" / "cross").mkdir(parents=True)
    (parts / "test_flat").mkdir()
    (parts / "test_flat" / "broken.png").write_bytes(b"no picture")
    Image.new("L", (40, 40)).save(parts / "test_flat" / "a.png")
    for file in (parts / "test_of_few" / "cross").iterdir():
        file.unlink()
    monkeypatch.chdir(tmp_path)
    words = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_resnet",
             "--steps", 2)
    assert call(train_teacher.main, *words, *CPU) == 0
