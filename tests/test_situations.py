"""What people really have: odd folders, files, names and disks. Each is used, named or refused."""

import errno
import io
import os
import shutil
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CPU, DATASET, VIEW_SIZE, call, make_set
from PIL import Image

import distill
import evaluate
import infer
import train_teacher
from common import cli, files, folders, metrics, models, pictures, splits
from common.files import UserError
from common.pictures import DecodedCache, list_pictures

TRAIN = ("--view-size", VIEW_SIZE, "--model", "test_resnet", "--steps", 2, *CPU)


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Call train_teacher.py on a folder, and return (status, what it printed, what it refused)."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *words):
        status = call(train_teacher.main, "--data-dir", folder, *TRAIN, *words)
        return (status, *capfd.readouterr())

    return run


# ---------------------------------------------------------------------------------------- pictures


def png_of_16_bits(values):
    """A PNG of uint16 [H, W, C], which Pillow cannot write: C 2 is grey with alpha, 3 RGB."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_of_16_bits(values, order, planes=1):
    """An uncompressed TIFF of uint16 RGB [H, W, 3]; order: "<" or ">"; planes: 2 for one by one."""
    height, width, _ = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, None), (259, 3, 1), (262, 3, 2),
            (273, 4, 200), (277, 3, 3), (278, 3, height), (279, 4, values.nbytes), (284, 3, planes)]
    bits, entries = 180, b""
    for tag, kind, value in tags:
        count = 3 if value is None else 1
        short = struct.pack(f"{order}HH", value, 0) if kind == 3 and value is not None else None
        field = short or struct.pack(f"{order}I", bits if value is None else value)
        entries += struct.pack(f"{order}HHI", tag, kind, count) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    data = head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    data = data.ljust(bits, b"\0") + struct.pack(f"{order}HHH", 16, 16, 16)
    return data.ljust(200, b"\0") + values.astype(f"{order}u2").tobytes()


@pytest.mark.parametrize("encode", [
    png_of_16_bits, lambda v: tiff_of_16_bits(v, "<"), lambda v: tiff_of_16_bits(v, ">"),
], ids=["PNG", "TIFF", "TIFF, big end first"])
def test_all_bits_of_16_bit_colours_are_read(encode):
    values = np.random.default_rng(0).integers(0, 4096, (150, 7, 3)).astype(np.uint16)
    picture, brightest, _ = infer.decode(encode(values), white_level=4095)
    assert (picture == (values.astype(np.float32) / (4095 / 255)).astype(np.uint8)).all()
    assert brightest == values.max()


def test_alpha_beside_16_bits_changes_no_colour():
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, 4)).astype(np.uint16)
    for channels, colours in ((2, values[..., [0, 0, 0]]), (4, values[..., :3])):
        picture, _, _ = infer.decode(png_of_16_bits(values[..., :channels]), white_level=4095)
        assert (picture == (colours.astype(np.float32) / (4095 / 255)).astype(np.uint8)).all()


def test_16_bit_colours_in_a_layout_that_pillow_reads_wrongly_are_refused():
    values = np.full((4, 4, 3), 999, np.uint16)
    with pytest.raises(ValueError, match="plane by plane"):
        infer.decode(tiff_of_16_bits(values, "<", planes=2))


def test_16_bit_grey_that_pillow_would_read_as_its_negative_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(file, "TIFF")
    photometric = struct.pack("<HHII", 262, 3, 1, 1)  # black is 0
    assert infer.decode(file.getvalue())[1] == 999 and photometric in file.getvalue()
    white_is_0 = file.getvalue().replace(photometric, struct.pack("<HHII", 262, 3, 1, 0))
    with pytest.raises(ValueError, match="whose white is 0"):
        infer.decode(white_is_0)


def test_16_bit_colours_of_a_ppm_are_refused_since_pillow_reads_8_of_them():
    with pytest.raises(ValueError, match="16-bit colours in a .ppm.*save it as PNG"):
        infer.decode(b"P6 2 1 65535\n" + bytes(12))
    assert infer.decode(b"P6 2 1 255\n" + bytes(6))[0].shape == (1, 2, 3)
    assert infer.decode(b"P5 2 1 65535\n" + bytes(4))[1] == 0


@pytest.mark.parametrize("values, white_level, flag", [
    (np.linspace(0, 1, 64, dtype=np.float32), 65535, 1),
    (np.arange(64, dtype=np.uint16) * 4, 65535, 255),
    (np.arange(64, dtype=np.uint16) * 16, 4095, 1023),
    (np.arange(64, dtype=np.uint16) * 1000, 4095, 65535),
    (np.arange(64, dtype=np.uint16) * 64, 4095, None),
])
def test_pictures_too_dark_or_bright_for_the_white_level_name_the_flag_that_fits(
    tmp_path, cache, capsys, values, white_level, flag
):
    (tmp_path / "deep").mkdir()
    Image.fromarray(values[None].repeat(64, 0)).save(tmp_path / "deep" / "a.tif")
    cache.open(tmp_path / "deep", [64, 64], white_level)
    said = capsys.readouterr().out
    if flag is None:
        assert "warning" not in said
        return
    assert f"--white-level {flag}\n" in said and f"is {values.max():g}, white level" in said
    cache.open(tmp_path / "deep", [64, 64], flag)
    assert "warning" not in capsys.readouterr().out


def exif_of(tag):
    """An EXIF block with an orientation, and a resolution in text, which no tag may be."""
    entries = struct.pack("<HHIHH", 274, 3, 1, tag, 0) + struct.pack("<HHI4s", 282, 2, 4, b"72")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_turned_upright_whatever_else_is_in_exif(tag):
    from PIL import ImageOps

    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    plain = Image.Exif()
    plain[274] = tag
    files = {"odd": io.BytesIO(), "plain": io.BytesIO()}
    frame.save(files["odd"], "JPEG", exif=exif_of(tag))
    frame.save(files["plain"], "JPEG", exif=plain)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(files["plain"])))
    assert (infer.decode(files["odd"].getvalue())[0] == upright).all()


@pytest.mark.parametrize("block", [b"Exif\0\0garbage here", b"Exif\0\0II*\0"])
def test_a_damaged_exif_block_makes_no_picture_unreadable(block):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", exif=block)
    assert infer.decode(file.getvalue())[0].shape == (8, 8, 3)


def test_of_several_pages_the_first_that_is_no_thumbnail_is_read_and_counted(
    tmp_path, cache, capsys
):
    tiny, large = Image.new("L", (4, 4), 10), Image.new("L", (40, 40), 200)
    (tmp_path / "pages").mkdir()
    large.save(tmp_path / "pages" / "one.tif")
    file = io.BytesIO()
    tiny.save(file, "TIFF", save_all=True, append_images=[large], tiffinfo={254: 1})
    data = bytearray(file.getvalue())  # both pages are marked as thumbnails: unmark the second
    second = data.rindex(struct.pack("<HHI", 254, 4, 1))
    data[second + 8] = 0
    (tmp_path / "pages" / "two.tif").write_bytes(data)
    picture, _, several = infer.decode(bytes(data))
    assert several and picture.shape == (40, 40, 3) and picture.min() == 200
    dark = tiny.resize((40, 40))
    large.save(tmp_path / "pages" / "three.gif", save_all=True, append_images=[dark])
    assert infer.decode((tmp_path / "pages" / "three.gif").read_bytes())[0].min() > 150
    cache.open(tmp_path / "pages", [40, 40])
    assert "files with several pages: 2;" in capsys.readouterr().out


def test_a_png_with_megabytes_of_text_is_read():
    from PIL.PngImagePlugin import PngInfo

    notes, file = PngInfo(), io.BytesIO()
    notes.add_text("notes", "n" * 3_000_000, zip=True)
    Image.new("L", (5, 4)).save(file, "PNG", pnginfo=notes)
    assert infer.decode(file.getvalue())[0].shape == (4, 5, 3)


def test_a_jpeg_without_its_end_and_one_too_large_say_what_to_do(monkeypatch):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    with pytest.raises(OSError) as error:
        infer.decode(file.getvalue()[:-2])
    assert "copy it again, or open and save it anew" in infer.why_unreadable(error.value)
    monkeypatch.setattr(infer, "MAX_PIXELS", 4000)
    with pytest.raises(ValueError, match="MAX_PIXELS, MAX_SIDE in infer.py.*cut it up or shrink"):
        infer.decode(file.getvalue())


# ------------------------------------------------------------------------------ files and folders


def test_files_and_folders_left_out_are_counted_in_one_line(tmp_path, capsys):
    names = ("good/a.jfif", "good/b.jpe", "good/c.heic", "good/d.heic", "good/e", "good/._f.jpg",
             "good/@eaDir/g.jpg", "good/#recycle/h.jpg", "good/.ipynb_checkpoints/i.jpg",
             "good/Thumbs.db")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    used = ["good/a.jfif", "good/b.jpe"]
    for _ in range(2):
        assert list_pictures(tmp_path) == used
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for words in ("2 .heic", "1 without ending", "1 folder @eaDir", "1 folder #recycle"):
        assert words in said
    on_a_device = [p.relative_to(tmp_path).as_posix() for p in infer.list_pictures([str(tmp_path)])]
    assert on_a_device == used and "2 .heic" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_other_spellings_of_val_are_used(train, tmp_path, name):
    parts = make_set(tmp_path / "parts", {"train": 6, "val": 3, "test": 3})
    (parts / "val").rename(parts / name)
    (parts / "images_old").mkdir()
    status, said, _ = train(parts)
    assert status == 0 and "18 training and 9 validation pictures" in said
    assert said.count("no stage reads images_old/") == 1


def test_two_folders_that_could_both_be_val_are_refused(train, tmp_path):
    parts = make_set(tmp_path / "parts", {"train": 6, "val": 3})
    shutil.copytree(parts / "val", parts / "valid")
    status, _, error = train(parts)
    assert status == 2 and "both are read as val/" in error


def test_class_folders_without_train_around_them_say_the_layout(train, tmp_path):
    parts = make_set(tmp_path / "parts", {"train": 3})
    status, _, error = train(parts / "train")
    assert status == 2 and "no train/ in it, but cross/, level/, upright/" in error
    assert "DIR/train/<class>/" in error and "give the folder above it" in error


def test_a_test_set_may_lack_classes_and_a_line_says_so(inside, tmp_path, capfd):
    few = make_set(tmp_path / "s", {"test_few": 4}) / "test_few"
    shutil.rmtree(few / "cross")
    shutil.rmtree(few / "upright")
    words = ("runs/student/model.pt", "runs/student/student.ts", "--test-dirs", few, "parts/test")
    assert call(evaluate.main, *words, *CPU, "--output", tmp_path / "r") == 0
    said = capfd.readouterr().out
    assert "test_few: has no pictures of cross, upright, so it says nothing about them" in said
    assert "no pictures" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    (few / "bent").mkdir()
    shutil.copy(few / "level" / "l000.png", few / "bent")
    assert call(evaluate.main, *words, *CPU, "--output", tmp_path / "r2") == 2
    assert "too many: bent" in capfd.readouterr().err


def test_training_pictures_that_are_gone_leave_the_audit_out_and_nothing_else(
    inside, tmp_path, capfd
):
    words = ("--test-dirs", "parts/test", *CPU, "--output", tmp_path / "r")
    (inside.data / "train").rename(inside.data / "gone")
    try:
        assert call(evaluate.main, "runs/student/model.pt", *words) == 0
    finally:
        (inside.data / "gone").rename(inside.data / "train")
    assert "audit: left out, since the training pictures are not here" in capfd.readouterr().out
    assert "Not audited" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")


def test_a_val_folder_that_lacks_a_class_says_what_to_do(train, tmp_path):
    parts = make_set(tmp_path / "parts", {"train": 6, "val": 3})
    shutil.rmtree(parts / "val" / "cross")
    status, _, error = train(parts)
    assert status == 2 and "missing: cross" in error and "a part of train/ validates then" in error


def test_a_mac_s_decomposed_class_names_are_those_of_other_systems(tmp_path, cache):
    parts = make_set(tmp_path / "parts", {"train": 3, "test": 3})
    composed, decomposed = (unicodedata.normalize(form, "schön") for form in ("NFC", "NFD"))
    (parts / "train" / "cross").rename(parts / "train" / composed)
    (parts / "test" / "cross").rename(parts / "test" / decomposed)
    classes, _ = splits.open_labelled(cache, parts / "train", DATASET)
    tests = splits.open_tests(cache, [parts / "test"], {**DATASET, "classes": classes})
    assert tests["test"].labels.bincount().tolist() == [3, 3, 3]
    shutil.copytree(parts / "train" / composed, parts / "train" / decomposed)
    with pytest.raises(UserError, match=r"'scho\\u0308n' and 'sch\\xf6n' look alike"):
        folders.class_folders(parts / "train")


@pytest.mark.parametrize("place", ["train/bent", "unlabelled", "val", "test_night"])
def test_a_folder_on_a_share_that_is_not_there_is_never_left_out(train, tmp_path, place):
    parts = make_set(tmp_path / "parts", {"train": 6, "test": 3})
    (parts / place).symlink_to(tmp_path / "not_mounted")
    status, _, error = train(parts)
    assert status == 2 and f"{place}: a link to nothing" in error


def test_pictures_divided_by_name_are_refused_under_other_names(tmp_path, cache):
    parts = make_set(tmp_path / "parts", {"train": 6})
    split = {"dir": parts, "val_fraction": 0.34, "group_regex": None, "dropped": [], **DATASET}
    _, _, dataset = splits.open_training(cache, split)
    (parts / "train").rename(parts / "training")
    with pytest.raises(UserError, match="has no train/.* any more; call its folders as they were"):
        splits.open_training(cache, dataset)


def test_unlabelled_pictures_of_parts_for_testing_or_validation_are_told(tmp_path, cache, capsys):
    parts = make_set(tmp_path / "parts", {"unlabelled": 3, "test": 3})
    for number, file in enumerate(sorted((parts / "unlabelled").iterdir())):
        file.rename(file.with_name(f"part{number}_2.png"))
    (parts / "test" / "level" / "l000.png").rename(parts / "test" / "level" / "part7_1.png")
    pool = splits.open_pool(cache, parts / "unlabelled", DATASET)
    tests = [splits.open_labelled(cache, parts / "test", DATASET)[1]]
    told = splits.unlabelled_of_parts(pool, tests, r"part(\d+)_", True, False)
    assert told == ["unlabelled/part7_2.png"]
    with pytest.raises(UserError, match="1 unlabelled pictures show parts that test or validation"):
        splits.unlabelled_of_parts(pool, tests, r"part(\d+)_", False, False)
    capsys.readouterr()
    assert splits.unlabelled_of_parts(pool, tests, r"/part(\d+)_", True, False) == []
    assert "matches no unlabelled picture (one is part0_2.png)" in capsys.readouterr().out


def test_a_pool_that_the_ensemble_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="pool: the ensemble was built without unlabelled pictures"):
        splits.open_same_pool(None, tmp_path / "pool", DATASET, None)
    assert splits.open_same_pool(None, "none", DATASET, None) is None


def test_lists_that_differ_say_in_which_members():
    same = ({"classes": ["a", "b", "c"]}, {"classes": ["a", "d", "c"]})
    with pytest.raises(UserError, match="missing: b; too many: d"):
        files.require_same(*same, "x", "y")
    alike = ({"classes": ["sch\u00f6n"]}, {"classes": ["scho\u0308n"]})
    with pytest.raises(UserError, match=r"missing: 'sch\\xf6n'; too many: 'scho\\u0308n'"):
        files.require_same(*alike, "x", "y")


def test_parts_that_stand_on_two_sides_stop_training_or_are_dropped(train, tmp_path):
    parts = make_set(tmp_path / "parts", {"train": 8, "val": 3, "test": 3})
    for folder, number in (("train", "7_1"), ("train", "8_1"), ("test", "7_2"), ("val", "8_2"),
                           ("val", "9_1"), ("test", "9_2")):
        some = sorted((parts / folder / "level").glob("l0*.png"))[0]
        some.rename(some.with_name(f"part{number}.png"))
    regex = ("--group-regex", r"part(\d+)_")
    status, said, error = train(parts, *regex)
    assert "matches 4 of 33 paths; each of the others counts as a part of its own" in said
    assert status == 2 and "3 training or validation pictures show parts that others" in error
    assert "level/part7_1.png = test/level/part7_2.png" in error
    status, said, _ = train(parts, *regex, "--drop-leaks")
    assert status == 0 and "22 training and 8 validation pictures" in said


# ------------------------------------------------------------------------------ flags and weights


def test_flags_that_nothing_is_done_with_are_named(train, tmp_path, monkeypatch, capfd):
    parts = make_set(tmp_path / "parts", {"train": 6, "val": 3})
    status, said, _ = train(parts, "--val-fraction", 0.3, "--white-level", 4095)
    assert status == 0 and "--val-fraction is not used, since there is a val/" in said
    assert "train: --white-level 4095 is not used" in said
    status, _, error = train(parts, "--group-regex", r"nowhere_(\d+)", "--overwrite")
    assert status == 2 and "matches no path" in error
    monkeypatch.setattr(sys, "argv", ["infer.py", "--watch", str(parts), "a.png"])
    with pytest.raises(SystemExit):
        infer.run()
    assert "give no other pictures" in capfd.readouterr().err


def test_a_list_flag_given_twice_is_extended_or_refused(monkeypatch, capsys):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["train_teacher.py", *words])
        return train_teacher.parse_arguments()

    recipe = parse("--view-recipe", "flip=0", "--view-recipe", "rotate=5").view_recipe
    assert recipe == ["flip=0", "rotate=5"]
    with pytest.raises(SystemExit):
        parse("--model", "resnet10t", "--model", "test_vit")
    assert "--model given twice" in capsys.readouterr().err


def test_a_batch_of_one_is_refused_before_batch_norm_fails(train, tmp_path):
    status, _, error = train(make_set(tmp_path / "parts", {"train": 6}), "-b", 1)
    assert status == 2 and "--batch-size 1: batch normalisation needs two pictures" in error


def weights_of(name):
    return models.create_teacher(name, 3, [32, 32]).backbone.state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "encoder_q.", "backbone."])
def test_teacher_weights_are_loaded_with_any_prefix(tmp_path, prefix):
    state = weights_of("test_resnet")
    state = {prefix + key: value for key, value in state.items() if "fc" not in key}
    torch.save(state, tmp_path / "x.pth")
    model = models.create_teacher("test_resnet", 2, [32, 32], weights=tmp_path / "x.pth")
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[key.removeprefix(prefix)], state[key]) for key in state)


def test_our_own_model_is_a_start_and_weights_that_do_not_fit_are_refused(inside, tmp_path):
    ours = "runs/test_resnet/model.pt"
    model = models.create_teacher("test_resnet", 2, [32, 40], weights=ours)
    theirs = models.load_checkpoint(ours)["state_dict"]
    assert torch.equal(model.state_dict()["backbone.conv1.0.weight"],
                       theirs["backbone.conv1.0.weight"])
    torch.save({}, tmp_path / "empty.pth")
    half = {key: value for key, value in weights_of("test_resnet").items() if "layer1" not in key}
    torch.save(half, tmp_path / "half.pth")
    for file, words in ((ours, "has 0 of"), (tmp_path / "empty.pth", "holds no weights"),
                        (tmp_path / "half.pth", "it lacks layer1")):
        name = "test_vit" if file == ours else "test_resnet"
        with pytest.raises(UserError, match=words):
            models.create_teacher(name, 2, [32, 32], weights=file)


def test_a_transformer_of_rectangles_starts_another_at_its_own_size_alone(inside):
    ours = "runs/test_vit/model.pt"
    header, theirs = models.read_header(ours), models.load_checkpoint(ours)["state_dict"]
    height, width = header["img_size"]
    assert height != width
    model = models.create_teacher("test_vit", 2, [height, width], weights=ours)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], theirs[key]) for key in loaded if ".head." not in key)
    words = f"was trained at {height}x{width} px.*--img-size {height}x{width}"
    with pytest.raises(UserError, match=words):  # timm would take its patches for a square's
        models.create_teacher("test_vit", 2, [64, 64], weights=ours)


def test_patches_that_overlap_enlarge_no_picture_needlessly():
    assert models.size_that_fits("pvt_v2_b0", [[32, 64]]) == [32, 64]


def test_weights_that_are_for_one_size_say_which(tmp_path):
    torch.save(timm.create_model("convit_tiny").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="its own are for 224 px, so try --img-size 224"):
        models.create_teacher("convit_tiny", 2, [128, 128], weights=tmp_path / "w.pth")
    models.create_teacher("convit_tiny", 2, [224, 224], weights=tmp_path / "w.pth")
    other = timm.create_model("convit_tiny", embed_dim=96).state_dict()  # no size helps it
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not load into convit_tiny") as refused:
        models.create_teacher("convit_tiny", 2, [224, 224], weights=tmp_path / "other.pth")
    assert "--img-size" not in str(refused.value)
    with pytest.raises(UserError, match="does not load into convit_tiny") as refused:
        models.create_teacher("convit_tiny", 2, [128, 128], weights=tmp_path / "other.pth")
    assert "--img-size" not in str(refused.value)


def test_weights_that_want_other_brightness_are_named():
    assert "vit_tiny_patch16_224.augreg_in21k" not in models.normalised_otherwise(
        "vit_tiny_patch16_224")
    assert "vit_base_patch16_224.mae" in models.normalised_otherwise("vit_base_patch16_224")
    assert models.normalised_otherwise("vit_small_patch14_dinov2") == []


# --------------------------------------------------------------------------------- good and bad


def test_good_classes_may_be_several_and_none_is_told(capsys):
    assert metrics.good_classes(["bent", "good", "OK"]) == ["good", "OK"]
    distill.check_good_classes(["ok_front", "def_front"], None)
    said = capsys.readouterr().out
    assert "no threshold" in said and "--good-class NAME" in said
    with pytest.raises(UserError, match="the classes are a, b"):
        distill.check_good_classes(["a", "b"], ["c"])
    with pytest.raises(UserError, match="names all classes"):
        distill.check_good_classes(["a", "b"], ["a", "b"])


def test_the_defect_score_leaves_out_all_good_classes():
    metadata = {"view_size": [2, 2], "white_level": 65535, "classes": ["bad", "good", "ok"],
                "good_classes": ["ok", "good"], "operating_point": {"threshold": 0.5}}
    student = lambda pictures: np.array([[0.2, 0.5, 0.3]], np.float32)  # noqa: E731
    verdict = infer.Judge(student, metadata)(Path("x"), np.zeros((2, 2, 3), np.uint8))
    assert verdict["defect_score"] == pytest.approx(0.2) and verdict["decision"] == "PASS"


# --------------------------------------------------------------------------------------- disks


def test_without_file_locks_a_script_warns_and_works(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / ".theirs.tmp").touch()
    with files.exclusive(tmp_path):
        pass
    assert "no file locks there" in capsys.readouterr().out
    assert (tmp_path / ".theirs.tmp").exists()  # perhaps another process's, alive


def test_processes_of_one_number_write_to_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    with files.atomic_path(tmp_path / "x") as mine, files.atomic_path(tmp_path / "x") as theirs:
        assert mine != theirs
        mine.write_text("1")
        theirs.write_text("2")


def test_a_picture_that_another_reader_can_read_is_read_anew(tmp_path, monkeypatch):
    train = make_set(tmp_path / "s", {"train": 3}) / "train"
    monkeypatch.setattr(infer, "MAX_PIXELS", 100)
    cache = DecodedCache(tmp_path / "decoded", skip_bad=True)
    assert len(cache.open(train, [16, 16]).bad) == 9
    monkeypatch.undo()
    assert len(cache.open(train, [16, 16]).bad) == 9  # the same reader, as far as is known
    monkeypatch.setattr(pictures, "READER", ["of another version"])
    assert not cache.open(train, [16, 16]).bad


def test_a_share_s_bad_moment_is_no_fault_of_a_picture(tmp_path, monkeypatch, capsys):
    train = make_set(tmp_path / "s", {"train": 3}) / "train"
    read = type(train).read_bytes

    def fail(path):
        if path.name == "l001.png":
            raise OSError(errno.EIO, "Input/output error")  # as read() raises it
        return read(path)

    monkeypatch.setattr(type(train), "read_bytes", fail)
    lenient = DecodedCache(tmp_path / "decoded", skip_bad=True)
    with pytest.raises(OSError, match="l001.png"):
        lenient.open(train, [16, 16])
    assert "start again when the disk or share answers" in cli.in_one_line(
        OSError(errno.EIO, "Input/output error", "x"))
    assert "start again when nothing moves files there" in cli.in_one_line(
        OSError(errno.ENOENT, "No such file or directory", "x"))
    monkeypatch.undo()
    assert len(lenient.open(train, [16, 16]).paths) == 9
