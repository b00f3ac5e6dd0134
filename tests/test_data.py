"""Packs: every kind of picture is read, every bad one is named, and nothing stale is served."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from common import data
from common.cli import UserError
from conftest import make_set

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


@pytest.mark.parametrize("mode, kind", [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"), ("RGB", "BMP"), ("P", "GIF")])
def test_colour_pictures_of_every_mode_keep_their_colours(mode, kind):
    pixels = data.read_picture(saved(two_halves().convert(mode, palette=Image.Palette.ADAPTIVE), kind))
    assert pixels.shape == (20, 40, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[5, 5].astype(int) - RED).max() <= 30 and np.abs(pixels[5, 35].astype(int) - GREEN).max() <= 30


def test_grey_and_16_bit_pictures_keep_their_brightness():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(8, 0)
    grey = data.read_picture(saved(Image.fromarray(ramp), "PNG"))
    deep = data.read_picture(saved(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG"))
    assert (grey == ramp[..., None]).all()
    assert np.abs(deep.astype(int) - grey).max() <= 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    pixels = data.read_picture(saved(two_halves(), "PNG", exif=exif))
    assert pixels.shape == (40, 20, 3)
    assert pixels[5, 10, 0] > 150 and pixels[35, 10, 1] > 150  # red above, green below


def test_infer_reads_pictures_exactly_as_training_does(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 8
    deep = Image.fromarray((np.arange(800, dtype=np.uint16) * 80).reshape(20, 40))
    for file in (saved(two_halves(), "JPEG", exif=exif), saved(two_halves().convert("CMYK"), "JPEG"), saved(deep, "PNG"),
                 saved(two_halves().convert("RGBA"), "PNG"), saved(two_halves().convert("L"), "PNG")):
        ours = data.read_picture(file)
        file.seek(0)
        assert (infer.read_picture(file) == ours).all()
    for module in (data, infer):
        monkeypatch.setattr(module, "MAX_PIXELS", 100)
        with pytest.raises(ValueError, match="over the limit"):
            module.read_picture(saved(two_halves(), "PNG"))


def test_every_bad_picture_is_named_in_one_error_and_skip_bad_leaves_them_out(tmp_path, data_args, capsys, monkeypatch):
    root = make_set(tmp_path / "s", {"train": 4}) / "train"
    good = (root / "level" / "l000.png").read_bytes()
    (root / "level" / "l001.png").write_bytes(b"")
    (root / "cross" / "c002.png").write_bytes(good[: len(good) // 2])
    (root / "upright" / "note.jpg").write_text("not a picture")
    Image.new("L", (200, 200)).save(root / "upright" / "big.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 30_000)
    with pytest.raises(UserError) as error:
        data.open_pack(root, 32, data_args)
    for name in ("l001.png: the file is empty", "c002.png", "note.jpg", "big.png: ValueError: 200 x 200"):
        assert name in str(error.value)
    data_args.skip_bad = True
    pack = data.open_pack(root, 32, data_args)
    assert len(pack.images) == len(pack.paths) == len(pack.labels) == 10
    expected = data.resize(torch.from_numpy(data.read_picture(root / pack.paths[-1])), 32)
    assert (pack.images[-1] == expected.numpy()).all()
    assert "left out 4 pictures" in capsys.readouterr().out


def test_a_changed_byte_rebuilds_the_pack_and_a_changed_time_stamp_does_not(tmp_path, data_args, capsys):
    root = make_set(tmp_path / "s", {"train": 3}) / "train"
    file = root / "level" / "l000.png"
    first = data.open_pack(root, 16, data_args)
    assert "packed" in capsys.readouterr().out
    os.utime(file, (1, 1))
    assert data.open_pack(root, 16, data_args).fingerprint == first.fingerprint
    assert "packed" not in capsys.readouterr().out
    before, changed = file.stat(), bytearray(file.read_bytes())
    changed[-1] ^= 1  # the checksum of the end chunk, which Pillow does not read: same size, same pixels
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = data.open_pack(root, 16, data_args)
    assert "packed" in capsys.readouterr().out and second.fingerprint != first.fingerprint


def test_a_truncated_pack_is_built_again(tmp_path, data_args, capsys):
    root = make_set(tmp_path / "s", {"train": 3}) / "train"
    first = data.open_pack(root, 16, data_args)
    copy = np.array(first.images)
    array = next((tmp_path / "packs").glob("*/images.npy"))
    array.write_bytes(array.read_bytes()[:-100])
    assert (data.open_pack(root, 16, data_args).images == copy).all()


def test_hold_out_is_stratified_and_repeatable():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    train, val = data.hold_out(labels, [str(i) for i in range(160)], 0.2, 0)
    assert list(np.bincount(labels[val])) == [20, 10, 2]
    assert sorted([*train, *val]) == list(range(160))
    again = data.hold_out(labels, [str(i) for i in range(160)], 0.2, 0)[1]
    other = data.hold_out(labels, [str(i) for i in range(160)], 0.2, 1)[1]
    assert (val == again).all() and list(val) != list(other)


def test_hold_out_keeps_groups_whole():
    paths = [f"{'hole' if k % 3 else 'screw'}/{photo}_{k}.jpg" for photo in range(40) for k in range(4)]
    labels = np.array([p.startswith("screw") for p in paths], int)
    groups = data.groups_of(paths, r"/(\d+)_")
    train, val = data.hold_out(labels, groups, 0.25, 0)
    assert not {groups[i] for i in train} & {groups[i] for i in val}
    assert len(val) == 40 and np.bincount(labels[val]).tolist() == [20, 20]


def test_a_class_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="cannot be split"):
        data.hold_out(np.array([0, 0, 0, 0, 1]), list("abcde"), 0.2, 0)


def test_resize_never_crops():
    picture = torch.zeros(30, 90, 3, dtype=torch.uint8)
    picture[:, :3] = 255  # a bright left edge
    small = data.resize(picture, 30)
    assert small.shape == (30, 30, 3) and small[:, 0].min() > 200 and small[:, 2:].max() == 0


def test_view_size_follows_small_pictures_and_stops_at_224(tmp_path):
    for name, side in (("small", 100), ("large", 500)):
        for c in "ab":
            (tmp_path / name / "train" / c).mkdir(parents=True)
            Image.new("L", (side, side // 2)).save(tmp_path / name / "train" / c / "x.png")
    assert data.default_view_size(tmp_path / "small") == 96
    assert data.default_view_size(tmp_path / "large") == 224
