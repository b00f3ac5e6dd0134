"""Bad input ends with status 2 and one line that says what, where and how to mend it, before any work."""

import json
import shutil

import pytest
import torch

import build_ensemble
import distill
import evaluate
import infer
import train_teacher
from common.checkpoints import exclusive
from conftest import SIDE, call, make_set

CPU = ("--device", "cpu")
TRAIN = ("--view-size", SIDE, "--model", "test_resnet", "--epochs", 1, *CPU)


@pytest.fixture
def refused(inside, capfd):
    """Call a script and return what it said, after checking for status 2 and no traceback."""

    def check(main, *words):
        capfd.readouterr()
        assert call(main, *words) == 2
        error = capfd.readouterr().err
        assert "error: " in error and "Traceback" not in error
        return error

    return check


def test_folders_that_are_no_labelled_set(refused, tmp_path):
    out = ("--output", tmp_path / "out")
    assert "no such folder" in refused(train_teacher.main, "--data-dir", tmp_path / "none", *TRAIN, *out)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "0 class folders" in refused(train_teacher.main, "--data-dir", tmp_path / "empty", *TRAIN, *out)
    one = make_set(tmp_path / "one", {"train": 3})
    shutil.rmtree(one / "train" / "cross"), shutil.rmtree(one / "train" / "level")
    assert "1 class folders" in refused(train_teacher.main, "--data-dir", one, *TRAIN, *out)
    hollow = make_set(tmp_path / "hollow", {"train": 3})
    (hollow / "train" / "zinc").mkdir()
    assert "zinc: this class has no pictures" in refused(train_teacher.main, "--data-dir", hollow, *TRAIN, *out)
    differs = make_set(tmp_path / "differs", {"train": 6, "val": 2})
    (differs / "val" / "cross").rename(differs / "val" / "crosses")
    assert "classes differs" in refused(train_teacher.main, "--data-dir", differs, *TRAIN, *out)
    assert not (tmp_path / "out").exists()


def test_every_unreadable_picture_is_listed_before_training(refused, tmp_path):
    bad = make_set(tmp_path / "bad", {"train": 4})
    (bad / "train" / "cross" / "c000.png").write_bytes(b"")
    (bad / "train" / "level" / "l000.png").write_bytes(b"\x89PNG nonsense")
    error = refused(train_teacher.main, "--data-dir", bad, *TRAIN, "--output", tmp_path / "out")
    assert "2 pictures cannot be read" in error and "c000.png" in error and "l000.png" in error and "--skip-bad" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_run_is_writing_to(refused, tmp_path):
    for main, folder, words in ((train_teacher.main, "test_resnet", ("--data-dir", "parts", *TRAIN, "--output", tmp_path)),
                                (build_ensemble.main, "e", ("--output", tmp_path / "e", *CPU)),
                                (distill.main, "s", ("--output", tmp_path / "s", *CPU))):
        with exclusive(tmp_path / folder):
            assert f"{tmp_path / folder}: in use by another process" in refused(main, *words)
        assert not (tmp_path / folder).exists()


def test_model_names_and_weights(refused, tmp_path):
    out = ("--output", tmp_path / "out", *CPU)
    assert "resnet18" in refused(train_teacher.main, "--data-dir", "parts", "--model", "resnet_18", *out)
    assert "no such file" in refused(train_teacher.main, "--data-dir", "parts", *TRAIN, "--weights", "none.pt", "--output", tmp_path)
    (tmp_path / "w.pt").write_bytes(b"junk")
    assert "does not load" in refused(train_teacher.main, "--data-dir", "parts", *TRAIN, "--weights", tmp_path / "w.pt", "--output", tmp_path)
    assert "one for each" in refused(train_teacher.main, "--model", "test_vit", "test_resnet", "--weights", tmp_path / "w.pt", *out)
    assert "one for each" in refused(train_teacher.main, "--model", "test_vit", "test_resnet", "--epochs", 1, 2, 3, *out)
    assert "each name once" in refused(train_teacher.main, "--model", "test_vit", "test_vit", *out)
    assert "not a readable state dict" in refused(distill.main, "--weights", tmp_path / "w.pt", *out)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pt")
    assert "ResNet18" in refused(distill.main, "--weights", tmp_path / "w.pt", *out)


@pytest.mark.parametrize("words", [
    ("--temperature", 0), ("--temperature", "nan"), ("--alpha", 1.5), ("--alpha", -0.1), ("--epochs", 0), ("--lr", "fast"),
    ("-b", 0), ("--seed", -1), ("--device", "tpu9")])
def test_values_out_of_range(refused, tmp_path, words):
    assert str(words[1]) in refused(distill.main, *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_view_recipe_and_group_regex(refused, tmp_path):
    base = ("--data-dir", "parts", *TRAIN, "--output", tmp_path)
    assert "no such name" in refused(train_teacher.main, *base, "--view-recipe", "rotation=3")
    assert "NAME=NUMBER" in refused(train_teacher.main, *base, "--view-recipe", "rotate=x")
    assert "out of range" in refused(train_teacher.main, *base, "--view-recipe", "zoom_min=2")
    assert "no (group)" in refused(train_teacher.main, *base, "--group-regex", "abc")
    assert "matches no path" in refused(train_teacher.main, *base, "--group-regex", "(q+)")


def test_run_folders_in_use_and_resume_of_nothing(refused, tmp_path):
    assert "--overwrite" in refused(train_teacher.main, "--data-dir", "parts", *TRAIN)
    assert "--overwrite" in refused(distill.main, *CPU)
    assert "does not exist" in refused(distill.main, "--resume", "--output", tmp_path / "none", *CPU)
    assert "does not exist" in refused(train_teacher.main, "--resume", "--data-dir", "parts", *TRAIN, "--output", tmp_path)


def test_teachers_that_do_not_belong_together(refused, tmp_path):
    other = make_set(tmp_path / "other", {"train": 10}, seed=1)
    assert call(train_teacher.main, "--data-dir", other, *TRAIN, "--output", tmp_path) == 0
    stranger = tmp_path / "test_resnet" / "best.pt"
    error = refused(build_ensemble.main, "runs/test_vit/best.pt", stranger, "--output", tmp_path / "e", *CPU)
    assert "fingerprint differs" in error and not (tmp_path / "e").exists()
    assert "a student, not a teacher" in refused(build_ensemble.main, "runs/student/best.pt", "--output", tmp_path / "e", *CPU)
    assert "not a readable checkpoint" in refused(build_ensemble.main, "runs/ensemble/ensemble.json", *CPU)
    assert "holds another ensemble: seed differs" in refused(build_ensemble.main, "--seed", 5, *CPU)


def test_logits_that_do_not_belong_to_the_pictures(refused, tmp_path):
    other = make_set(tmp_path / "other", {"train": 24, "unlabelled": 16}, seed=1)
    out = ("--output", tmp_path / "out", *CPU)
    assert "fingerprint differs" in refused(distill.main, "--data-dir", other, *out)
    assert "unlabelled differs" in refused(distill.main, "--unlabelled", other / "unlabelled", *out)
    shutil.copytree("runs/ensemble", tmp_path / "e")
    record = json.loads((tmp_path / "e" / "ensemble.json").read_text())
    record["view_recipe"]["version"] += 1
    (tmp_path / "e" / "ensemble.json").write_text(json.dumps(record))
    assert "view recipe version differs" in refused(distill.main, tmp_path / "e", *out)
    shutil.rmtree(tmp_path / "e")
    shutil.copytree("runs/ensemble", tmp_path / "e")
    view = tmp_path / "e" / "view_001.npy"
    view.write_bytes(view.read_bytes()[:-8])
    assert "missing or damaged" in refused(distill.main, tmp_path / "e", *out)
    assert "no ensemble here" in refused(distill.main, tmp_path / "nowhere", *out)
    assert not (tmp_path / "out").exists()


def test_a_student_is_not_resumed_on_an_ensemble_that_was_built_anew(refused, tmp_path):
    shutil.copytree("runs/ensemble", tmp_path / "e")
    words = (tmp_path / "e", "--epochs", 2, "--output", tmp_path / "s", *CPU)
    assert call(distill.main, *words) == 0
    assert call(distill.main, *words, "--resume") == 0
    record = json.loads((tmp_path / "e" / "ensemble.json").read_text())
    record["weights"] = record["weights"][::-1]
    (tmp_path / "e" / "ensemble.json").write_text(json.dumps(record))
    assert "the ensemble was built anew" in refused(distill.main, *words, "--resume")


def test_a_checkpoint_with_one_flipped_bit_is_refused(refused, tmp_path):
    data = bytearray(open("runs/student/best.pt", "rb").read())
    data[len(data) // 2] ^= 1
    (tmp_path / "best.pt").write_bytes(data)
    assert "damaged" in refused(evaluate.main, tmp_path / "best.pt", "--output", tmp_path / "r", *CPU)


def test_models_and_test_sets_that_evaluate_cannot_use(refused, tmp_path):
    out = ("--output", tmp_path / "r", *CPU)
    assert "no such file" in refused(evaluate.main, "runs/none.pt", *out)
    (tmp_path / "x.ts").write_bytes(b"junk")
    assert "not a student.ts" in refused(evaluate.main, tmp_path / "x.ts", *out)
    fewer = make_set(tmp_path / "fewer", {"test": 3})
    shutil.rmtree(fewer / "test" / "cross")
    assert "classes differs" in refused(evaluate.main, "runs/student/best.pt", "--test-dirs", fewer / "test", *out)
    (tmp_path / "bare").mkdir()
    assert "no test* folder" in refused(evaluate.main, "runs/student/best.pt", "--data-dir", tmp_path / "bare", *out)
    assert not (tmp_path / "r").exists()


def test_infer_names_what_is_missing(inside, monkeypatch, capsys, tmp_path):
    (tmp_path / "x.ts").write_bytes(b"junk")
    for words, expected in ((["--model", "none.ts", "parts"], "no such file"), (["--model", str(tmp_path / "x.ts"), "parts"], "not a student.ts"),
                            (["nowhere"], "no such file or folder")):
        monkeypatch.setattr("sys.argv", ["infer.py", *words])
        with pytest.raises(SystemExit) as end:
            infer.main()
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
