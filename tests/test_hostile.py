"""Pictures from outside: damaged ones, small files that grow large, and links."""

import io
import os
import random
import struct
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from conftest import ROOT, make_set, read_picture
from PIL import Image
from test_situations import png_of_16_bits, tiff_of_16_bits

import infer
from common import folders
from common.files import UserError
from common.pictures import list_pictures


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1_048_576, 48), (9000, 9000), (10, 70_000)])
def test_a_small_file_of_too_many_pixels_is_refused_before_it_is_decoded(size):
    data = encoded(Image.new("L", size), "TIFF", compression="tiff_lzw")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="over the limit"):
        read_picture(io.BytesIO(data))
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_kilobytes_that_claim_a_large_picture_are_refused_before_they_are_decoded(kind):
    data = encoded(Image.new("L", (4001, 4000)), kind)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="as no camera writes"):
        read_picture(io.BytesIO(data))
    assert time.perf_counter() - start < 0.2


def test_a_large_picture_needs_the_bytes_of_one_and_a_smaller_picture_does_not(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (4000, 4000)).save(path)
    assert read_picture(path).shape == (4000, 4000, 3)
    Image.new("L", (4001, 4000)).save(path)
    os.truncate(path, 4001 * 4000 // 250)
    assert read_picture(path).shape == (4000, 4001, 3)


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded():
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda"):-2]
    assert read_picture(io.BytesIO(data)).shape == (4000, 4000, 3)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="scans"):
        read_picture(io.BytesIO(data[:-2] + 500 * scan + data[-2:]))
    assert time.perf_counter() - start < 0.2


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no /proc here")
def test_reading_a_picture_takes_no_more_than_eight_bytes_a_pixel(tmp_path):
    Image.new("RGB", (4000, 4000)).save(tmp_path / "x.png")
    program = (
        "from infer import decode\n"
        "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status')\n"
        "                        if line.startswith('VmHWM'))\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the peak begins anew\n"
        "before = peak()\n"
        f"decode(open({str(tmp_path / 'x.png')!r}, 'rb').read())\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1024 * int(run.stdout) < 9 * 4000 * 4000  # 17 a pixel where it is converted whole


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes what the modules set
def test_damaged_pictures_of_every_kind_raise_an_exception_or_are_read_within_a_second():
    rng, chance = np.random.default_rng(0), random.Random(0)
    pixels = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    whole = [
        encoded(pixels.convert(mode), kind, **options) for mode, kind, options in [
            ("RGB", "PNG", {}), ("P", "PNG", {}), ("RGB", "JPEG", {}), ("RGB", "BMP", {}),
            ("CMYK", "JPEG", {"progressive": True}), ("P", "GIF", {}), ("RGB", "WEBP", {}),
            ("RGB", "TIFF", {}), ("L", "TIFF", {"compression": "tiff_lzw"}), ("F", "TIFF", {}),
            ("1", "TIFF", {"compression": "group4"}), ("RGB", "PPM", {}),
        ]
    ]
    whole.append(encoded(Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64)), "PNG"))
    deep = rng.integers(0, 4096, (48, 64, 3)).astype(np.uint16)
    whole += [png_of_16_bits(deep), tiff_of_16_bits(deep, "<"), tiff_of_16_bits(deep, ">")]
    readable = 0
    for number in range(40 * len(whole)):
        data = bytearray(whole[number % len(whole)])
        if number % 3 == 0:
            del data[chance.randrange(len(data)):]
        for _ in range(chance.randrange(4)):
            place = chance.randrange(min(len(data), 200) or 1)
            data[place:place + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        start = time.perf_counter()
        with suppress(Exception):  # of many kinds
            read_picture(io.BytesIO(data))
            readable += 1
        assert time.perf_counter() - start < 1
    assert readable > 50


def test_a_file_is_read_as_its_bytes_are_where_a_strip_holds_less_than_the_picture(tmp_path):
    ramp = Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64) * 20)
    data = bytearray(encoded(ramp, "TIFF"))
    rows = data.index(struct.pack("<HHI", 278, 4, 1)) + 8  # RowsPerStrip, of one strip
    data[rows:rows + 4] = struct.pack("<I", 5)
    (tmp_path / "x.tif").write_bytes(data)
    pixels = read_picture(io.BytesIO(data))
    assert pixels[4].any() and not pixels[5:].any()
    assert (read_picture(tmp_path / "x.tif") == pixels).all()


def test_what_no_camera_writes_is_not_even_tried(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "x.png").write_bytes(script)
    with pytest.raises(Image.UnidentifiedImageError):
        read_picture(tmp_path / "x.png")


def test_pictures_of_floats_with_holes_are_read_without_a_warning(recwarn):
    values = np.full((4, 4), 65535, np.float32)
    values[0] = np.nan
    pixels = read_picture(io.BytesIO(encoded(Image.fromarray(values), "TIFF")))
    assert pixels[0].max() == 0 and pixels[1:].min() == 255
    assert not recwarn.list


# ------------------------------------------------------------------------------------------- links


def test_linked_pictures_and_linked_class_folders_count_and_a_line_says_so(tmp_path, capsys):
    train = make_set(tmp_path / "parts", {"train": 3}) / "train"
    store = tmp_path / "store"
    (train / "level").rename(store)
    (train / "level").symlink_to(store)
    (train / "cross" / "c000.png").rename(tmp_path / "one.png")
    (train / "cross" / "c000.png").symlink_to(tmp_path / "one.png")
    (train / "cross" / "twin.png").symlink_to("c001.png")
    names = list_pictures(train)
    assert len(names) == 10 and {"level/l000.png", "cross/c000.png"} <= set(names)
    os.mkfifo(train / "cross" / "pipe.png")  # whoever reads it waits for ever
    assert list_pictures(train) == names
    assert names == sorted(names)
    assert list(folders.class_folders(train)) == ["cross", "level", "upright"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "follows 2 links that lead out of it" in said
    found = [path.relative_to(train).as_posix() for path in infer.list_pictures([str(train)])]
    assert found == names


def test_links_in_a_circle_and_links_to_nothing_are_refused(tmp_path):
    train = make_set(tmp_path / "parts", {"train": 2}) / "train"
    (train / "level" / "again").symlink_to(train)
    with pytest.raises(UserError, match="level/again: a link to a folder that it lies in"):
        list_pictures(train)
    assert len(list(infer.list_pictures([str(train)]))) == 6  # a device goes on
    (train / "level" / "again").unlink()
    (train / "level" / "lost.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="lost.png: a link to nothing"):
        list_pictures(train)


def test_a_folder_that_may_not_be_read_is_never_left_out_in_silence(tmp_path, monkeypatch):
    train, scan = make_set(tmp_path / "parts", {"train": 2}) / "train", os.scandir

    def forbid(folder):
        if str(folder).endswith("level"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", forbid)  # root may read everything
    for read in (list_pictures, lambda folder: list(infer.list_pictures([str(folder)]))):
        with pytest.raises(PermissionError):
            read(train)


def test_hidden_pictures_are_left_out_on_a_device_as_in_training(tmp_path):
    for name in ("b/a.png", "a/.hidden.png", ".thumbs/a.png", "b.png", "a/.git/x/a.png", "a/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    paths = [path.relative_to(tmp_path).as_posix() for path in infer.list_pictures([str(tmp_path)])]
    assert paths == list_pictures(tmp_path) == ["a/link/a.png", "b/a.png", "b.png"]
