"""Bad input ends with status 2 and one line: what, where, how to mend it, before any work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import CPU, ROOT, VIEW_SIZE, call, make_set

import build_ensemble
import distill
import evaluate
import infer
import train_teacher
from common import cli, models
from common.files import exclusive, load_json, save_json
from common.models import load_checkpoint, save_checkpoint

TRAIN = ("--view-size", VIEW_SIZE, "--model", "test_resnet", "--steps", 2, *CPU)
PARTS = ("--data-dir", "parts", *TRAIN)
RESNET = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_resnet", *CPU)


@pytest.fixture
def refused(inside, capfd):
    """Call a script and return what it said, after checking for status 2 and no traceback."""

    def check(script, *words):
        capfd.readouterr()
        assert call(script.main, *words) == 2
        error = capfd.readouterr().err
        assert "error: " in error and "Traceback" not in error
        return error

    return check


def test_folders_that_are_no_labelled_set(refused, tmp_path):
    def train(folder):
        return refused(train_teacher, "--data-dir", folder, *TRAIN, "--output", tmp_path / "out")

    assert "no such folder" in train(tmp_path / "none")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "0 class folders" in train(tmp_path / "empty")
    one = make_set(tmp_path / "one", {"train": 3})
    shutil.rmtree(one / "train" / "cross")
    shutil.rmtree(one / "train" / "level")
    assert "1 class folders" in train(one)
    hollow = make_set(tmp_path / "hollow", {"train": 3})
    (hollow / "train" / "zinc").mkdir()
    assert "zinc: this class has no pictures" in train(hollow)
    differs = make_set(tmp_path / "differs", {"train": 6, "val": 2})
    (differs / "val" / "cross").rename(differs / "val" / "crosses")
    assert "classes differs" in train(differs)
    assert not (tmp_path / "out").exists()


def test_every_unreadable_picture_is_listed_before_training(refused, tmp_path):
    bad = make_set(tmp_path / "bad", {"train": 4})
    (bad / "train" / "cross" / "c000.png").write_bytes(b"")
    (bad / "train" / "level" / "l000.png").write_bytes(b"\x89PNG nonsense")
    error = refused(train_teacher, "--data-dir", bad, *TRAIN, "--output", tmp_path / "out")
    for words in ("2 pictures cannot be read", "c000.png", "l000.png", "--skip-bad"):
        assert words in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_run_is_writing_to(refused, tmp_path):
    calls = {
        "test_resnet": (train_teacher, *PARTS, "--output", tmp_path),
        "e": (build_ensemble, "--output", tmp_path / "e", *CPU),
        "s": (distill, "--output", tmp_path / "s", *CPU),
        "r": (evaluate, "--output", tmp_path / "r", *CPU),
    }
    for name, words in calls.items():
        folder = tmp_path / name
        with exclusive(folder):
            assert f"{folder}: in use by another process" in refused(*words)
        assert not folder.exists()


def test_model_names_and_weights(refused, tmp_path):
    def train(*words):
        pictures = ("--data-dir", "parts", "--view-size", VIEW_SIZE, *CPU)
        return refused(train_teacher, *pictures, "--output", tmp_path / "out", "--model", *words)

    file, two = tmp_path / "w.pt", ("test_vit", "test_resnet")
    file.write_bytes(b"")
    assert "does not load" in train("test_resnet", "--weights", file)
    file.write_bytes(b"junk")
    assert "near: resnet18" in train("resnet_18")
    assert "no such file" in train("test_resnet", "--weights", "none.pt")
    assert "does not load" in train("test_resnet", "--weights", file)
    assert "one for each" in train(*two, "--weights", file)
    assert "one for each" in train(*two, "--steps", 1, 2, 3)
    assert "each name once" in train("test_vit", "test_vit")

    student = ("--weights", file, "--output", tmp_path / "out", *CPU)
    for content in (b"", b"junk"):
        file.write_bytes(content)
        assert "not a readable state dict" in refused(distill, *student)
    torch.save({"conv1.weight": torch.zeros(3)}, file)
    assert "ResNet18" in refused(distill, *student)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ("--temperature", 0), ("--temperature", "nan"), ("--alpha", 1.5), ("--alpha", -0.1),
    ("--steps", 0), ("--lr", "fast"), ("-b", 0), ("--seed", -1), ("--device", "tpu9"),
    ("--good-class", "lost"), ("--seed", 20241231235959), ("--img-size", 7),
])
def test_values_out_of_range(refused, tmp_path, words):
    assert str(words[1]) in refused(distill, *CPU, *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [
    "0x5", "x", "3x", "96x", "96x240x3", "31", "4097", "32x5000", "96*240", "",
])
def test_view_sizes_that_are_none(refused, tmp_path, size):
    base = (train_teacher, *PARTS, "--output", tmp_path / "out")
    assert "from 32 to 4096 px" in refused(*base, "--view-size", size)


def test_a_size_that_a_teacher_cannot_take_is_refused_before_pictures_and_weights(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_teacher, "open_pictures", None)
    (tmp_path / "w.pth").write_bytes(b"junk")
    base = (train_teacher, "--data-dir", "parts", "--output", tmp_path / "out")
    maxvit = (*base, "--model", "maxvit_nano_rw_256", "--weights", tmp_path / "w.pth")
    error = refused(*maxvit, "--img-size", "48x80")
    assert "--model maxvit_nano_rw_256 at 48x80 px" in error and "--img-size" in error


def test_view_recipe_and_group_regex(refused, tmp_path):
    base = (train_teacher, *PARTS, "--output", tmp_path)
    assert "no such name" in refused(*base, "--view-recipe", "rotation=3")
    assert "NAME=NUMBER" in refused(*base, "--view-recipe", "rotate=x")
    assert "out of range" in refused(*base, "--view-recipe", "zoom_min=2")
    assert "out of range" in refused(*base, "--view-recipe", "rotate=inf")
    assert "no (group)" in refused(*base, "--group-regex", "abc")
    assert "matches no path" in refused(*base, "--group-regex", "(q+)")


def test_run_folders_in_use_and_resume_of_nothing(refused, tmp_path):
    assert "--overwrite" in refused(train_teacher, *PARTS)
    assert "--overwrite" in refused(distill, *CPU)
    nothing = ("--resume", "--output", tmp_path / "none")
    assert "holds no run" in refused(distill, *nothing, *CPU)
    assert "holds no run" in refused(train_teacher, *nothing, *PARTS)


def test_more_views_than_a_process_may_open_files_are_refused(refused):
    assert "--views 501: at most 500" in refused(build_ensemble, "--views", 501, *CPU)


def test_a_finished_run_that_lost_its_last_pt_is_never_begun_anew_by_resume(refused, tmp_path):
    folder = tmp_path / "test_resnet"
    folder.mkdir()
    shutil.copy("runs/test_resnet/model.pt", folder)
    before = (folder / "model.pt").read_bytes()
    begun = (*RESNET, "-b", 16, "--output", tmp_path)
    words = (*begun, "--steps", 160)
    assert "holds a run already" in refused(train_teacher, *words)
    assert call(train_teacher.main, *words, "--resume") == 0  # nothing is left to do
    assert (folder / "model.pt").read_bytes() == before
    assert "steps differs" in refused(train_teacher, *begun, "--resume", "--steps", 300)
    (folder / "model.pt").rename(folder / "log.csv")  # neither of the two is left
    assert "neither last.pt" in refused(train_teacher, *words, "--resume")
    assert (folder / "log.csv").read_bytes() == before


def test_a_run_is_resumed_only_as_warm_and_on_the_pictures_it_began_with(refused, tmp_path):
    begun, folder = (*RESNET, "--output", tmp_path), tmp_path / "test_resnet"
    words = (*begun, "--steps", 2)
    assert call(train_teacher.main, *words) == 0
    assert "steps differs" in refused(train_teacher, *begun, "--resume", "--steps", 3)
    assert "lr differs" in refused(train_teacher, *words, "--resume", "--lr", 0.1)
    state = load_checkpoint(folder / "last.pt")
    (folder / "model.pt").unlink()
    state["dataset"]["dropped"] = ["train/level/l000.png"]
    save_checkpoint(state, folder / "last.pt")
    assert "dropped differs" in refused(train_teacher, *words, "--resume")
    state["dataset"]["dropped"], state["args"]["weights"] = [], ["somewhere.pt"]
    save_checkpoint(state, folder / "last.pt")
    assert "pretrained differs" in refused(train_teacher, *words, "--resume")


def test_teachers_that_do_not_belong_together(refused, tmp_path):
    def build(*words):
        return refused(build_ensemble, *words, *CPU)

    other = make_set(tmp_path / "other", {"train": 10}, seed=1)
    assert call(train_teacher.main, "--data-dir", other, *TRAIN, "--output", tmp_path) == 0
    stranger, out = tmp_path / "test_resnet" / "model.pt", ("--output", tmp_path / "e")
    assert "fingerprint differs" in build("runs/test_vit/model.pt", stranger, *out)
    assert "a student, not a teacher" in build("runs/student/model.pt", *out)
    assert not (tmp_path / "e").exists()
    assert "not a readable checkpoint" in build("runs/ensemble/ensemble.json")
    assert "holds another ensemble: seed differs" in build("--seed", 5)


def test_logits_that_do_not_belong_to_the_pictures(refused, tmp_path):
    def distil(*words):
        return refused(distill, *words, "--output", tmp_path / "out", *CPU)

    def copied():
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        shutil.copytree("runs/ensemble", tmp_path / "e")
        return tmp_path / "e"

    other = make_set(tmp_path / "other", {"train": 24, "unlabelled": 16}, seed=1)
    assert "added, removed or changed since; give" in distil("--data-dir", other)
    said = distil("--unlabelled", other / "unlabelled")
    assert "added, removed or changed since the ensemble was built" in said
    assert "build_ensemble.py --unlabelled none --overwrite" in distil("--unlabelled", "none")
    assert "no ensemble here" in distil(tmp_path / "nowhere")

    folder = copied()
    record = load_json(folder / "ensemble.json")
    record["view_recipe"]["version"] += 1
    save_json(record, folder / "ensemble.json")
    assert "view recipe version differs" in distil(folder)

    view = copied() / "view_001.npy"
    view.write_bytes(view.read_bytes()[:-8])
    assert "computes it anew" in distil(folder)
    assert not (tmp_path / "out").exists()


def test_a_student_is_not_resumed_on_an_ensemble_that_was_built_anew(
    refused, no_export, tmp_path
):
    folder = tmp_path / "e"
    shutil.copytree("runs/ensemble", folder)
    words = (folder, "--steps", 2, "--output", tmp_path / "s", *CPU)
    assert call(distill.main, *words) == 0
    for flag, value in (("alpha", 0.5), ("temperature", 0.5), ("batch_size", 16), ("seed", 1),
                        ("img_size", 48), ("clip_grad", 2), ("weight_decay", 0)):
        other = ("--" + flag.replace("_", "-"), value)
        assert f"{flag} differs" in refused(distill, *words, *other, "--resume")
    record = load_json(folder / "ensemble.json")
    record["weights"] = record["weights"][::-1]
    save_json(record, folder / "ensemble.json")
    (tmp_path / "s" / "model.pt").unlink()  # as of a run that is not finished
    assert "ensemble differs" in refused(distill, *words, "--resume")
    teacher = ("--resume", "--output", "runs/test_vit", *CPU)
    assert "resume with the flags" in refused(distill, *teacher)


def test_pretrained_without_a_network_says_what_to_do(refused, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    create = models.timm.create_model
    monkeypatch.setattr(models.timm, "create_model", lambda name, pretrained=False, **more:
                        no_network() if pretrained else create(name, **more))
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", no_network)
    out = ("--output", tmp_path / "out")
    assert "give --weights FILE" in refused(train_teacher, *RESNET, "--pretrained", *out)
    for hub in ((), ("timm",)):
        assert "give --weights FILE" in refused(distill, *CPU, *out, "--pretrained", *hub)


def test_every_flag_of_the_readme_is_in_the_help_of_a_script(capsys):
    flag, said = r"(?<![\w-])--[a-z][a-z0-9-]+", ""
    for script in (train_teacher, build_ensemble, distill, evaluate, infer):
        assert call(script.main, "--help") == 0
        said += capsys.readouterr().out
    others = {"--standalone", "--nproc-per-node", "--save"}  # torchrun's, trtexec's
    named = set(re.findall(flag, (ROOT / "README.md").read_text("utf-8"))) - others
    assert len(named) > 30 and named <= set(re.findall(flag, said))


def test_a_student_is_resumed_without_the_file_that_it_started_from(no_export, inside, tmp_path):
    file = tmp_path / "start.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    words = ("--weights", file, "--steps", 2, "--output", tmp_path / "s", *CPU)
    assert call(distill.main, *words) == 0
    file.unlink()
    assert call(distill.main, *words, "--resume") == 0


@pytest.mark.parametrize("name", ["resnet18.nonsense", "tf_efficientnet_b0_ns"])
def test_a_model_whose_name_timm_has_no_more_is_refused_with_those_near_it(refused, name):
    words = ("--data-dir", "parts", "--model", name, "--output", "runs/none", *CPU)
    assert "timm has no such model; near: " in refused(train_teacher, *words)


def test_an_ensemble_whose_teacher_was_trained_again_is_told(refused, no_export, tmp_path, capfd):
    folder = tmp_path / "e"
    shutil.copytree("runs/ensemble", folder)
    record = load_json(folder / "ensemble.json")
    record["teachers"][0]["weights_sha256"] = "of before"
    save_json(record, folder / "ensemble.json")
    said = "test_resnet/model.pt is missing, damaged or was trained again"
    assert said in refused(evaluate, folder)
    words = (folder, "--steps", 2, "--output", tmp_path / "s", *CPU)
    assert call(distill.main, *words) == 0  # what it said is still on disk
    assert "test_resnet/model.pt is damaged, or another teacher now" in capfd.readouterr().out


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])  # in last.pt of weights and optimizer
def test_a_checkpoint_with_one_flipped_bit_is_refused(refused, tmp_path, place):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1
        path.write_bytes(content)

    shutil.copytree("runs/test_resnet", tmp_path / "test_resnet")
    model, last = tmp_path / "test_resnet" / "model.pt", tmp_path / "test_resnet" / "last.pt"
    words = (*RESNET, "--steps", 160, "-b", 16, "--output", tmp_path)
    before = load_checkpoint(model)
    model.unlink()  # as after a kill between the two
    assert call(train_teacher.main, *words, "--resume") == 0
    after = load_checkpoint(model)
    assert after.keys() == before.keys()
    assert after["weights_sha256"] == before["weights_sha256"]
    flip(model)
    error = refused(evaluate, model, "--output", tmp_path / "r", *CPU)
    assert "model.pt: damaged" in refused(train_teacher, *words, "--resume")
    model.unlink()
    flip(last)
    assert "last.pt: damaged" in refused(train_teacher, *words, "--resume")
    assert "damaged" in error and not (tmp_path / "r").exists()


def test_a_teacher_whose_logits_are_not_finite_is_refused(refused, tmp_path):
    state = load_checkpoint("runs/test_resnet/model.pt")
    state["state_dict"]["backbone.fc.bias"][1] = float("nan")
    save_checkpoint(state, tmp_path / "model.pt")
    words = ("runs/test_vit/model.pt", tmp_path / "model.pt", "--output", tmp_path / "e", *CPU)
    assert f"{tmp_path / 'model.pt'}: some of its logits are not finite" in refused(
        build_ensemble, *words
    )


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(2**50, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8),
])
def test_too_little_memory_is_one_line_that_names_the_batch_size(capfd, allocate):
    with pytest.raises(SystemExit) as end:
        cli.run(allocate)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: out of memory") and "--batch-size" in error


def test_an_interrupted_script_says_how_to_go_on(capfd):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run(interrupted)
    assert end.value.code == 130 and "--resume" in capfd.readouterr().err


def test_names_that_are_not_utf8_do_not_stop_a_script():
    code = "import os; from common import cli; cli.run(lambda: print(os.fsdecode(b'a\\xff.png')))"
    words = {"cwd": ROOT, "capture_output": True, "env": {**os.environ, "LC_ALL": "C.UTF-8"}}
    ended = subprocess.run([sys.executable, "-c", code], **words)
    assert ended.returncode == 0 and ended.stdout == b"a\\udcff.png\n"


def test_models_and_test_sets_that_evaluate_cannot_use(refused, tmp_path):
    def judge(*words):
        return refused(evaluate, *words, "--output", tmp_path / "r", *CPU)

    assert "no such file" in judge("runs/none.pt")
    foreign = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(foreign, tmp_path / "foreign.ts")
    (tmp_path / "x.ts").write_bytes(b"junk")
    (tmp_path / "x.pt").write_bytes(b"")
    assert "not a student.ts" in judge(tmp_path / "foreign.ts")
    assert "not a student.ts" in judge(tmp_path / "x.ts")
    assert "cut off" in judge(tmp_path / "x.pt")
    fewer = make_set(tmp_path / "fewer", {"test": 3})
    shutil.rmtree(fewer / "test" / "cross")
    student = "runs/student/model.pt"
    twice = judge(student, "--test-dirs", "parts/test", "parts/test_other/../test")
    assert "give each test set once" in twice
    assert "--data-dir" in judge("runs/student/student.ts")
    assert not Path("data").exists()  # the embedded set is not drawn for it
    (fewer / "test" / "level").rename(fewer / "test" / "bent")
    assert "too many: bent" in judge(student, "--test-dirs", fewer / "test")
    (tmp_path / "bare").mkdir()
    assert "no test* folder" in judge(student, "--data-dir", tmp_path / "bare")
    (tmp_path / "flat").mkdir()
    shutil.copy("parts/test/level/l000.png", tmp_path / "flat")
    assert "0 class folders" in judge(student, "--test-dirs", tmp_path / "flat")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words, expected", [
    (["--model", "none.ts", "parts"], "no such file"),
    (["--model", "junk.ts", "parts"], "not a student.ts"),
    (["nowhere"], "no such file or folder"),
    (["--watch", "nowhere"], "no such folder"),
])
def test_infer_names_what_is_missing(inside, monkeypatch, capsys, words, expected):
    (inside.root / "junk.ts").write_bytes(b"junk")
    monkeypatch.setattr("sys.argv", ["infer.py", *words])
    with pytest.raises(SystemExit) as end:
        infer.main()
    assert end.value.code == 2 and expected in capsys.readouterr().err
