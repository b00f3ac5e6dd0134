"""The five scripts together: what passes between them, resuming, killing, and the exported file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import build_ensemble
import distill
import evaluate
import infer
import train_teacher
from common import data, training
from common.checkpoints import load
from common.ensemble import load_ensemble, open_views, soft_targets
from common.export import load_exported
from common.models import create_teacher, fine_tuning_rates, load_model, parameter_groups, predict
from conftest import ROOT, SIDE, TEACHERS, call

CPU = ("--device", "cpu")


def weights(path):
    return load(path)["state_dict"]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_metrics_file_has_the_promised_keys_and_agrees_with_itself(tiny):
    report = json.loads((tiny.runs / "report" / "metrics.json").read_text())
    names = [f"runs/{t}/best.pt" for t in sorted(TEACHERS)] + ["runs/ensemble", "runs/alone/best.pt", "runs/student/best.pt"]
    assert set(names) < set(report["models"])
    for model in report["models"].values():
        assert set(model["sets"]) == {"test", "test_other"}
        assert model["mean_accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in model["sets"].values()]))
        for name, n in (("test", 60), ("test_other", 36)):
            s = model["sets"][name]
            assert s["n"] == n == np.sum(s["confusion_matrix"])
            assert s["accuracy"] == pytest.approx(np.trace(s["confusion_matrix"]) / n)
            assert {"balanced_accuracy", "macro_f1", "nll", "ece", "minus_baseline"} <= set(s)
    assert "rows are true" in (tiny.runs / "report" / "confusion.txt").read_text()


def test_the_students_learn_something(tiny):
    report = json.loads((tiny.runs / "report" / "metrics.json").read_text())
    assert report["models"]["runs/student/best.pt"]["mean_accuracy"] > 0.5  # chance is 1/3


def test_exported_file_agrees_with_the_checkpoint_from_the_picture_file_on(tiny, data_args):
    model, state = load_model(tiny.runs / "student" / "best.pt", torch.device("cpu"))
    exported, metadata = load_exported(tiny.runs / "student" / "student.ts")
    pictures = data.whole(data.open_pack(tiny.data / "test", SIDE, data_args))
    expected = F.softmax(predict(model, pictures, torch.device("cpu")) / metadata["temperature"], dim=1)
    with torch.no_grad():
        raw = [torch.from_numpy(data.read_picture(tiny.data / "test" / path)) for path in pictures.packs[0].paths]
        ours = torch.cat([exported(picture) for picture in raw])
        batch, planes = exported(torch.stack(raw)), exported(torch.stack(raw).permute(0, 3, 1, 2))
    assert raw[0].shape == (40, 48, 3)  # so the resize inside the file is at work
    for probabilities in (ours, batch, planes):
        assert torch.allclose(probabilities, expected, atol=1e-5)
    assert metadata["classes"] == state["classes"] == ["cross", "level", "upright"]


def test_infer_runs_alone_and_reports_bad_pictures(tiny, tmp_path):
    shutil.copy(ROOT / "infer.py", tmp_path)
    shutil.copy(tiny.runs / "student" / "student.ts", tmp_path)
    shutil.copytree(tiny.data / "test" / "level", tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no")
    block = ("import sys, runpy\n"
             "class Block:\n"
             "    def find_spec(self, name, path=None, target=None):\n"
             "        if name.split('.')[0] in ('common', 'timm', 'torchvision', 'tqdm', 'pytest', 'safetensors'):\n"
             "            raise ImportError('blocked: ' + name)\n"
             "sys.meta_path.insert(0, Block()); sys.argv = ['infer.py'] + sys.argv[1:]\n"
             "runpy.run_path('infer.py', run_name='__main__')\n")

    def run(*words):
        return subprocess.run([sys.executable, "-c", block, "--model", "student.ts", *words], cwd=tmp_path, capture_output=True, text=True)

    plain, as_json = run("pictures"), run("--json", "pictures")
    assert plain.returncode == as_json.returncode == 1 and "broken.png: cannot be read" in plain.stderr
    rows, records = plain.stdout.splitlines(), [json.loads(line) for line in as_json.stdout.splitlines()]
    assert len(rows) == len(records) == 20
    for row, record in zip(rows, records):
        path, name, probability = row.split("\t")
        assert path == record["path"] and name == record["class"]
        assert record["probabilities"][name] == max(record["probabilities"].values()) == record["probability"]
        assert float(probability) == pytest.approx(record["probability"], abs=1e-3)


def test_alpha_zero_trains_bit_for_bit_like_plain_cross_entropy(inside, tmp_path, monkeypatch):
    words = ("--epochs", 2, "-b", 16, "--alpha", 0, *CPU)
    assert call(distill.main, *words, "--output", tmp_path / "ours") == 0
    monkeypatch.setattr(distill, "distillation_loss", lambda logits, labels, soft, alpha, tau, weights: F.cross_entropy(logits, labels))
    assert call(distill.main, *words, "--output", tmp_path / "plain") == 0
    assert same_weights(tmp_path / "ours" / "best.pt", tmp_path / "plain" / "best.pt")


def test_soft_targets_are_the_mixture_of_the_stored_logits(tiny):
    record = load_ensemble(tiny.runs / "ensemble")
    views = open_views(tiny.runs / "ensemble", record)
    assert record["shape"] == [2, 105, 3] and len(views) == 4
    q = soft_targets(views, record, [2, 1], [7, 100], 3.0)
    for row, (view, index) in enumerate(((2, 7), (1, 100))):
        z = np.load(tiny.runs / "ensemble" / f"view_{view:03d}.npy")[:, index].astype(np.float64)
        p = [np.exp(z[t] / record["temperatures"][t] / 3) for t in range(2)]
        expected = sum(w * e / e.sum() for w, e in zip(record["weights"], p))
        assert np.allclose(q[row], expected, atol=1e-5)


@pytest.mark.parametrize("script", ["teacher", "student"])
def test_an_interrupted_run_resumes_to_the_same_weights(inside, tmp_path, monkeypatch, script):
    if script == "teacher":
        main, runs = train_teacher.main, ("test_vit", "test_resnet")  # the second one has not begun when the first is interrupted
        words = ("--data-dir", "parts", "--view-size", SIDE, "--model", *runs, "--epochs", 4, "-b", 16, *CPU)
    else:
        main, runs, words = distill.main, ("",), ("--epochs", 4, "-b", 16, *CPU)
    assert call(main, *words, "--output", tmp_path / "whole") == 0

    real, saved = training.save, []

    def save_then_interrupt(state, path):
        real(state, path)
        saved.append(path)
        if path.name == "last.pt" and len([p for p in saved if p.name == "last.pt"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save", save_then_interrupt)
    assert call(main, *words, "--output", tmp_path / "cut") == 130
    monkeypatch.setattr(training, "save", real)
    assert load(tmp_path / "cut" / runs[0] / "last.pt")["epoch"] == 2
    assert call(main, *words, "--output", tmp_path / "cut") == 2  # neither --resume nor --overwrite
    assert call(main, *words, "--output", tmp_path / "cut", "--resume", "--lr", 0.5) == 2  # another run
    assert call(main, *words, "--output", tmp_path / "cut", "--resume") == 0
    for run in runs:
        for name in ("best.pt", "last.pt"):
            assert same_weights(tmp_path / "whole" / run / name, tmp_path / "cut" / run / name)
    logs = [(tmp_path / half / runs[0] / "log.csv").read_text().splitlines() for half in ("whole", "cut")]
    assert [[line.rsplit(",", 1)[0] for line in log] for log in logs][0] == [line.rsplit(",", 1)[0] for line in logs[1]]


def test_the_latest_checkpoint_within_one_standard_error_of_the_best_is_chosen():
    history = [{"val_balanced_accuracy": a} for a in (0.90, 29 / 30, 28 / 30, 27 / 30)]
    chosen = [training.good_enough(history[:end], 30) for end in range(1, 5)]
    assert chosen == [True, True, True, False]  # p = 31/34, one standard error 0.0486, 29/30 - 0.0486 = 0.918
    assert training.good_enough([{"val_balanced_accuracy": a} for a in (1, 29 / 30)], 30)  # 1 - 0.0404
    assert not training.good_enough([{"val_balanced_accuracy": a} for a in (1, 29 / 30)], 300)  # 1 - 0.0046
    assert training.balanced_number(torch.tensor([0] * 90 + [1] * 10)) == pytest.approx(36)  # 4 / (1 / 90 + 1 / 10)


def test_a_killed_build_goes_on_where_it_stopped(inside, tmp_path):
    command = [sys.executable, str(ROOT / "build_ensemble.py"), "--views", "40", "-b", "8", "--device", "cpu", "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "view_003.npy").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL) if os.name == "posix" else process.kill()
    process.wait()
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("view_*.npy")}
    assert 4 <= len(done) < 41
    assert call(distill.main, tmp_path / "killed", "--output", tmp_path / "s", *CPU) == 2  # unfinished
    words = ("--views", 40, "-b", 8, *CPU)
    assert call(build_ensemble.main, *words, "--output", tmp_path / "killed") == 0
    assert call(build_ensemble.main, *words, "--output", tmp_path / "whole") == 0
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == then for name, then in done.items())


def test_check_recomputes_stored_logits_and_fails_when_one_is_wrong(inside, tmp_path, capsys):
    shutil.copytree("runs/ensemble", tmp_path / "e")
    assert call(build_ensemble.main, "--check", 60, "--output", tmp_path / "e", *CPU) == 0
    assert "60 stored picture-views recomputed" in capsys.readouterr().out
    record = json.loads((tmp_path / "e" / "ensemble.json").read_text())
    for view in range(4):
        file = tmp_path / "e" / f"view_{view:03d}.npy"
        np.save(file, np.load(file) + np.float32(0.1))
        record["sha256"][view] = build_ensemble.file_sha256(file)
    (tmp_path / "e" / "ensemble.json").write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match="differ from the teachers'"):
        call(build_ensemble.main, "--check", 60, "--output", tmp_path / "e", *CPU)


def test_evaluate_takes_any_mix_and_names_sets_by_path_when_names_collide(inside, tmp_path):
    words = ("runs/student/student.ts", "runs/ensemble", "--test-dirs", "parts/test", "parts/test/../test", "--output", tmp_path, *CPU)
    assert call(evaluate.main, *words) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["models"]) == {"runs/student/student.ts", "runs/ensemble"}
    assert set(report["models"]["runs/ensemble"]["sets"]) == {"parts/test", "parts/test/../test"}


def test_a_model_of_another_input_size_is_measured_on_its_own_views(inside, tmp_path):
    words = ("--data-dir", "parts", "--view-size", 48, "--img-size", 40, "--model", "test_resnet", "--epochs", 1, *CPU)
    assert call(train_teacher.main, *words, "--output", tmp_path) == 0
    checkpoint = tmp_path / "test_resnet" / "best.pt"
    assert call(evaluate.main, checkpoint, "runs/student/best.pt", "--data-dir", "parts", "--output", tmp_path / "r", *CPU) == 0
    assert load(checkpoint)["img_size"] == 40


def test_a_transformer_whose_patches_do_not_divide_the_side_still_sees_the_edge():
    model, pixels = create_teacher("vit_tiny_patch16_224", 2, 40).eval(), torch.rand(1, 3, 40, 40) * 255
    edge_changed = pixels.clone()
    edge_changed[..., -2:] = 0
    assert model.img_size == 48  # of patches of 16
    assert not torch.allclose(model(pixels), model(edge_changed))


def test_training_stops_at_a_loss_that_is_not_finite(inside, tmp_path):
    words = ("--data-dir", "parts", "--view-size", SIDE, "--model", "test_resnet", "--epochs", 2, "--lr", 1e30, "--clip-grad", 0, *CPU)
    with pytest.raises(FloatingPointError, match="lower --lr"):
        call(train_teacher.main, *words, "--output", tmp_path)
    assert not (tmp_path / "test_resnet" / "best.pt").exists()


def test_pictures_of_cameras_of_any_shape_go_through_infer(tiny, tmp_path, capsys, monkeypatch):
    Image.new("RGBA", (333, 77)).save(tmp_path / "wide.png")
    Image.new("L", (5, 400)).save(tmp_path / "tall.png")
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(tiny.runs / "student" / "student.ts"), str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        infer.main()
    assert end.value.code == 0 and len(capsys.readouterr().out.splitlines()) == 2


def test_a_resnet_teacher_from_scratch_has_no_sleeping_branch_and_a_loaded_one_keeps_its_own(tmp_path):
    def asleep(model):
        return sum(not m.weight.any() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))

    theirs = timm.create_model("resnet10t", num_classes=3)
    assert asleep(theirs) == 4  # one per residual block: what timm does
    assert asleep(create_teacher("resnet10t", 3, 32)) == 0
    torch.save(theirs.state_dict(), tmp_path / "resnet10t.pth")
    assert asleep(create_teacher("resnet10t", 3, 32, weights=tmp_path / "resnet10t.pth")) == 4


def test_fine_tuning_holds_a_transformers_early_blocks_back_and_lets_a_cnns_move():
    slowest = {}
    for name in TEACHERS:
        model = create_teacher(name, 3, SIDE)
        backbone_lr, layer_decay = fine_tuning_rates(model.backbone)
        scales = sorted({group["lr_scale"] for group in parameter_groups(model, 0.05, layer_decay, backbone_lr)})
        assert scales[-1] == 1.0  # the new head
        slowest[name] = scales[0]
        assert all(b / a == pytest.approx(1 / layer_decay) for a, b in zip(scales[:-2], scales[1:-1]))
    assert slowest["test_vit"] < 0.06 and slowest["test_resnet"] > 0.7


def test_the_ensemble_can_be_asked_for_other_views_than_the_teachers_saw(inside, tmp_path):
    words = ("--views", 1, "--output", tmp_path / "wide", "--device", "cpu")
    assert call(build_ensemble.main, *words, "--view-recipe", "zoom_min=0.5") == 0
    recipe, before = (load_ensemble(folder)["view_recipe"] for folder in (tmp_path / "wide", inside.runs / "ensemble"))
    assert recipe == {**before, "zoom_min": 0.5} and recipe != before
    plain, views = (np.load(folder / "view_000.npy") for folder in (tmp_path / "wide", inside.runs / "ensemble"))
    assert np.array_equal(plain, views)
    assert np.abs(np.load(tmp_path / "wide" / "view_001.npy") - np.load(inside.runs / "ensemble" / "view_001.npy")).max() > 0.1
