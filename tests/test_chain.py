"""The scripts together: what passes between them, resuming, killing, and what they refuse to do."""

import csv
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CPU, DATASET, ROOT, SIZE, TEACHERS, VIEW_SIZE, call, make_set

import build_ensemble
import distill
import evaluate
import train_teacher
from common import models, splits, training
from common.ensemble import CachedLogits, load_ensemble, view_file, write_view
from common.files import UserError
from common.models import load_checkpoint
from common.pictures import DecodedCache
from common.training import Order
from common.views import ViewRecipe, render, shares

TRAIN = ("--data-dir", "parts", "--view-size", VIEW_SIZE)


def same_weights(a, b):
    one, other = (load_checkpoint(path)["state_dict"] for path in (a, b))
    return all(torch.equal(one[name], other[name]) for name in {**one, **other})


def read_report(folder):
    return json.loads((folder / "metrics.json").read_text())


# ---------------------------------------------------------------------------------------- training


def test_the_students_learn_something(tiny):
    report = read_report(tiny.runs / "report")
    assert report["models"]["runs/student/model.pt"]["mean_accuracy"] > 0.5  # chance is 1/3


@pytest.mark.parametrize("mixes", [False, True])
def test_a_steps_loss_is_the_formula_of_the_docstring_with_the_answers_to_its_views(
    inside, no_export, tmp_path, monkeypatch, mixes
):
    """All pictures in their second view: what log.csv says against numpy, from the same start."""
    monkeypatch.setattr(models, "precision", lambda device: None)  # in float32
    words = ("--steps", 2, "-b", 105, "--alpha", 0.7, "--temperature", 3, "--seed", 5)
    words += ("--lr", 1e-30)  # so that the first step leaves the start as it is
    words += ("--mixup",) if mixes else ()
    assert call(distill.main, *words, "--output", tmp_path / "s", *CPU) == 0
    _, second = csv.DictReader(open(tmp_path / "s" / "log.csv"))

    ensemble = load_ensemble("runs/ensemble")
    cache = DecodedCache("runs/decoded")
    train, _, dataset = splits.open_training(cache, ensemble["dataset"])
    pool = splits.open_pool(cache, "parts/unlabelled", dataset)
    pictures = train + pool
    torch.manual_seed(5)
    student = models.create_student(3, SIZE).train()
    student.to(memory_format=torch.channels_last)
    indices, _ = Order(pictures.labels, 5).batch(1, 105)
    views = np.full(105, 2)
    recipe = ViewRecipe.from_dict(ensemble["view_recipe"])
    with torch.no_grad():
        pixels = render(pictures.batch(indices), indices, views, ensemble["seed"], recipe)
        share = shares(5, 1, 105) if mixes else torch.ones(105)
        own = share[:, None, None, None]
        s = student(own * pixels + (1 - own) * pixels.roll(1, 0)).double().numpy()

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    z = np.load("runs/ensemble/view_002.npy")[:, indices].astype(np.float64)
    together = 0
    for logits, t, weight in zip(z, ensemble["temperatures"], ensemble["weights"]):
        together = together + weight * logits / t
    q = np.exp(log_softmax(together / 3))
    labels, own = pictures.labels[indices].numpy(), share.double().numpy()[:, None]
    assert (labels >= 0).sum() == 57
    y = np.where(labels[:, None] == np.arange(3), 1.0, 0.0)
    y, q = (own * rows + (1 - own) * np.roll(rows, 1, 0) for rows in (y, q))
    ce = -(y * log_softmax(s)).sum() / y.sum()
    kl = (q * (np.log(q) - log_softmax(s / 3))).sum(1).mean()
    assert float(second["loss"]) == pytest.approx(0.3 * ce + 0.7 * 9 * kl, rel=1e-5)


def test_alpha_zero_trains_bit_for_bit_like_plain_cross_entropy(
    inside, no_export, tmp_path, monkeypatch
):
    words = ("--steps", 7, "-b", 16, "--alpha", 0)
    assert call(distill.main, *words, "--output", tmp_path / "ours", *CPU) == 0

    monkeypatch.setattr(distill, "labelled_cross_entropy", F.cross_entropy)
    monkeypatch.setattr(distill, "CachedLogits", None)  # no teacher is asked
    assert call(distill.main, *words, "--output", tmp_path / "plain", *CPU) == 0
    assert same_weights(tmp_path / "ours" / "model.pt", tmp_path / "plain" / "model.pt")


@pytest.mark.parametrize("script", ["teacher", "student"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    inside, no_export, tmp_path, monkeypatch, script
):
    main, runs, words = distill.main, ("",), ("--steps", 12, "-b", 16)
    if script == "student":
        words += ("--mixup",)
    else:  # the second one has not begun when the first is interrupted
        main, runs = train_teacher.main, ("test_vit", "test_resnet")
        words = (*TRAIN, "--model", *runs, *words)
    assert call(main, *words, *CPU, "--output", tmp_path / "whole") == 0

    real, saved = training.save_checkpoint, []

    def save_then_interrupt(state, path):
        real(state, path)
        saved.append(path.name)
        if saved.count("last.pt") == 2:
            raise KeyboardInterrupt

    cut = (*words, *CPU, "--output", tmp_path / "cut")
    old = [tmp_path / "cut" / runs[-1] / name for name in ("model.pt", "student.ts")]
    old[0].parent.mkdir(parents=True)
    for file in old:
        file.write_bytes(b"of an earlier run")
    monkeypatch.setattr(training, "save_checkpoint", save_then_interrupt)
    assert call(main, *cut, "--overwrite") == 130
    assert not any(map(Path.exists, old))  # which --resume would take for finished
    monkeypatch.setattr(training, "save_checkpoint", real)
    assert load_checkpoint(tmp_path / "cut" / runs[0] / "last.pt")["steps"] == 3
    assert call(main, *cut) == 2  # neither --resume nor --overwrite
    assert call(main, *cut, "--resume", "--lr", 0.5) == 2  # another run
    with monkeypatch.context() as later:
        later.setattr(training, "VERSION", training.VERSION + 1)
        assert call(main, *cut, "--resume") == 2
    assert call(main, *cut, "--resume") == 0
    for run in runs:
        logs = []
        for half in ("whole", "cut"):
            rows = (tmp_path / half / run / "log.csv").read_text().splitlines()
            rows, seconds = zip(*(row.rsplit(",", 1) for row in rows))
            logs.append(rows)
            seconds = list(map(float, seconds[1:]))
            assert seconds == sorted(seconds)  # those before an interruption count
        assert logs[0] == logs[1]
        for name in ("model.pt", "last.pt"):
            assert same_weights(tmp_path / "whole" / run / name, tmp_path / "cut" / run / name)
    log = tmp_path / "cut" / runs[-1] / "log.csv"
    rows = log.read_text()
    log.unlink()  # as after a kill right after the last last.pt
    log.with_name("model.pt").unlink()
    assert call(main, *cut, "--resume") == 0
    assert log.read_text() == rows and log.with_name("model.pt").is_file()


def test_a_run_that_is_older_than_a_switch_is_resumed_with_it_off():
    dataset = dict.fromkeys(("fingerprint", "held_out", "dropped"))
    old, new, mixed = (
        training.identity({"args": {"lr": 0.1, **switch}, "dataset": dataset}, {})
        for switch in ({}, {"mixup": False}, {"mixup": True})
    )
    assert old == new != mixed


def test_training_stops_at_a_loss_that_is_not_finite(inside, tmp_path, capfd):
    words = (*TRAIN, "--model", "test_resnet", "--steps", 20, "--lr", 1e30, "--clip-grad", 0, *CPU)
    assert call(train_teacher.main, *words, "--output", tmp_path) == 2
    error = capfd.readouterr().err
    assert "the loss of step 2 is not finite (learning rate 5." in error
    assert "lower --lr" in error
    assert not (tmp_path / "test_resnet" / "model.pt").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_for_the_next_step():
    """In the main thread of a process, where a script trains."""
    program = """
import resource, torch
from common import cli

def use():
    for _ in range(10):
        torch.ones(2**24)  # 64 MB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

cli.pick_device("cpu")
print(-use() + use())
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 1000


def test_a_transformer_whose_patches_do_not_divide_the_side_still_sees_the_edge():
    model = models.create_teacher("vit_tiny_patch16_224", 2, [40, 40]).eval()
    pixels = torch.rand(1, 3, 40, 40) * 255
    edge_changed = pixels.clone()
    edge_changed[..., -2:] = 0
    assert model.img_size == [48, 48]  # of patches of 16
    assert not torch.allclose(model(pixels), model(edge_changed))


@pytest.mark.parametrize("name", ["efficientvit_m0", "xcit_nano_12_p8_224"])
def test_a_model_whose_patch_size_is_one_number_becomes_a_teacher(name):
    assert models.create_teacher(name, 3, [224, 224]).img_size == [224, 224]


def test_a_resnet_teacher_from_scratch_starts_awake_and_a_loaded_one_as_it_was(tmp_path):
    def asleep(model):
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        return sum(not norm.weight.any() for norm in norms)

    theirs = timm.create_model("resnet10t", num_classes=3)
    assert asleep(theirs) == 4  # one per residual block: what timm does
    assert asleep(models.create_teacher("resnet10t", 3, [32, 32])) == 0
    file = tmp_path / "resnet10t.pth"
    torch.save(theirs.state_dict(), file)
    assert asleep(models.create_teacher("resnet10t", 3, [32, 32], weights=file)) == 4


def test_fine_tuning_holds_a_transformers_early_blocks_back_and_lets_a_cnns_move():
    slowest = {}
    for name in TEACHERS:
        model = models.create_teacher(name, 3, SIZE)
        backbone_lr, layer_decay = train_teacher.fine_tuning_rates(model.backbone)
        groups = train_teacher.parameter_groups(model, 0.05, layer_decay, backbone_lr)
        scales = sorted({group["lr_scale"] for group in groups})
        assert scales[-1] == 1.0  # the new head
        slowest[name] = scales[0]
        for a, b in zip(scales[:-2], scales[1:-1]):
            assert b / a == pytest.approx(1 / layer_decay)
    assert slowest["test_vit"] < 0.06 and slowest["test_resnet"] > 0.7


def test_a_deep_transformers_first_block_learns_as_fast_as_that_of_twelve():
    def rates(name):
        model = models.create_teacher(name, 3, [32, 32])
        return [group["lr_scale"] for group in train_teacher.parameter_groups(model, 0, 0.75, 0.1)]

    twelve, deep = rates("vit_tiny_patch16_224"), rates("cait_xxs24_224")
    assert min(twelve) == pytest.approx(0.1 * 0.75**12) and min(deep) == min(twelve)


@pytest.mark.parametrize("name", ["test_vit", "coatnet_pico_rw_224"])  # the latter convolves too
def test_bfloat16_on_a_cpu_leaves_slow_operations_out_and_answers_as_before(name, monkeypatch):
    monkeypatch.setattr(models, "precision", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    model = models.create_teacher(name, 3, [32, 32]).eval()
    pixels = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        before = model(pixels)
        models.on_device(model, torch.device("cpu"))
        assert torch.allclose(model(pixels), before, atol=1e-4)

    dtypes, fused = [], [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d) and m.groups > 1:
            m.register_forward_hook(lambda m, x, y: dtypes.append(y.dtype))
    with torch.no_grad(), models.autocast(torch.device("cpu")):
        assert model(pixels).dtype == torch.bfloat16
    assert fused and not any(fused)
    assert set(dtypes) == (set() if name == "test_vit" else {torch.float32})


def test_both_heads_of_a_transformer_that_was_made_to_be_distilled_learn_at_the_full_rate():
    model = models.create_teacher("deit_tiny_distilled_patch16_224", 3, [32, 32])
    groups = train_teacher.parameter_groups(model, 0.05, 0.75, 0.1)
    full = [p for group in groups if group["lr_scale"] == 1.0 for p in group["params"]]
    assert sorted(p.numel() for p in full) == [3, 3, 3 * 192, 3 * 192]


def test_what_attends_is_told_by_its_heads_and_not_by_its_name():
    def is_transformer(name):
        with torch.device("meta"):
            return train_teacher.fine_tuning_rates(timm.create_model(name)) == (0.1, 0.75)

    cnns = ("repvgg_a0", "mobileone_s0", "gernet_s", "ese_vovnet19b_dw", "nfnet_f0", "resnet18")
    assert not any(map(is_transformer, cnns))
    transformers = ("test_vit", "swin_tiny_patch4_window7_224", "coatnet_nano_rw_224",
                    "hiera_tiny_224", "xcit_nano_12_p8_224")
    assert all(map(is_transformer, transformers))


def test_a_network_sees_the_rectangle_or_what_it_takes_that_is_like_it(capsys):
    # any size; whole patches of 16; whole strides of 32, since it has windows; a square; its own
    seen = {"test_resnet": [80, 200], "test_vit": [80, 208], "coatnet_nano_rw_224": [96, 224],
            "convit_tiny": [128, 128], "crossvit_tiny_240": [240, 240]}
    for name, size in seen.items():
        assert train_teacher.choose_img_size(name, [80, 200], None) == size
        model = models.create_teacher(name, 3, size)
        assert model.img_size == size
        with torch.no_grad():
            assert model.eval()(torch.zeros(2, 3, 80, 200)).shape == (2, 3)
    said = capsys.readouterr().out
    assert "convit_tiny does not take 80x200 px: it sees the views at 128 px" in said
    with pytest.raises(UserError, match="--model convit_tiny at 80x208 px: .*--img-size"):
        train_teacher.choose_img_size("convit_tiny", [80, 208], [80, 208])


@pytest.mark.parametrize("name", [
    "test_resnet", "test_vit",
    "deit_tiny_distilled_patch16_224", "repvit_m0_9"])  # two heads, and two in one
def test_all_logits_of_a_network_are_shifted_in_its_last_layer(name):
    teacher, student = models.create_teacher(name, 3, SIZE), models.create_student(3, SIZE)
    pixels, by = 255 * torch.rand(2, 3, *SIZE), torch.tensor([1.0, -2.0, 0.5])
    for model in (teacher, student):
        before = model.eval()(pixels)
        models.shift_logits(model, by)
        assert torch.allclose(model(pixels), before + by, atol=1e-5)


def test_clip_grad_and_weight_decay_hold_and_shrink_the_weights(inside, no_export, tmp_path):
    torch.manual_seed(3)
    start = models.create_student(3, SIZE).state_dict()["backbone.conv1.weight"]

    def moved(clip_grad, weight_decay):
        words = ("--clip-grad", clip_grad, "--weight-decay", weight_decay, "--steps", 1, "-b", 16)
        words += ("--seed", 3, "--overwrite", "--output", tmp_path)
        assert call(distill.main, *words, *CPU) == 0
        state = load_checkpoint(tmp_path / "model.pt")["state_dict"]
        return float((state["backbone.conv1.weight"] - start).abs().max())

    assert moved(1e-20, 0) < 1e-7 < moved(0, 0)
    assert moved(1e-20, 100) > 1e-4


def test_the_embedded_set_is_fine_tuned_like_any_other(monkeypatch):
    def plan(name, *words):
        monkeypatch.setattr("sys.argv", ["train_teacher.py", "--model", name, *words])
        args = train_teacher.parse_arguments()
        backbone = timm.create_model("test_resnet" if "resnet" in name else "test_vit")
        model = models.Classifier(backbone, [64, 64], (0,), (1,))
        schedule = train_teacher.plan(0, model, 480, {"dir": "data/fasteners"}, args)
        return schedule.steps, schedule.lr

    assert plan("coatnet_nano_rw_224") == (235, 3e-3) and plan("resnet10t") == (500, 3e-3)
    assert plan("test_resnet", "--pretrained") == (1200, 1e-3)
    assert plan("test_vit", "--pretrained") == (480, 1e-3)
    assert plan("test_vit", "--steps", "7", "--lr", "0.1") == (7, 0.1)
    assert plan("test_vit", "test_resnet", "--steps", "7", "9")[0] == 7


@pytest.mark.parametrize("labels, batch, steps, of_transformers", [
    (60, 24, 500, 200), (300, 24, 750, 300), (480, 48, 600, 240), (5000, 24, 2000, 500),
])
def test_a_teacher_sees_its_labels_so_often_within_bounds(labels, batch, steps, of_transformers):
    assert train_teacher.default_steps(labels, batch, *train_teacher.LENGTH) == steps
    its = train_teacher.default_steps(labels, batch, *train_teacher.OF_TRANSFORMERS)
    assert its == of_transformers


@pytest.mark.parametrize("count, short, views", [
    (1124, False, 17), (10**6, False, 4), (20, False, 200), (2208, True, 4), (2208, False, 9),
])
def test_of_few_pictures_many_views_are_stored(count, short, views):
    assert build_ensemble.default_views(count, short) == views


def test_a_student_starts_from_a_weight_file_of_either_kind_without_its_head(tmp_path):
    from safetensors.torch import save_file

    state = models.create_student(7, SIZE).backbone.state_dict()
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        student = models.create_student(3, SIZE, weights=tmp_path / name)
        assert torch.equal(student.backbone.conv1.weight, state["conv1.weight"])
        assert student.backbone.fc.out_features == 3


def test_a_student_starts_from_timms_resnet18_too(tmp_path, monkeypatch):
    theirs, asked = timm.create_model("resnet18", num_classes=5).eval(), []

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        return theirs

    monkeypatch.setattr(models.timm, "create_model", create_model)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    pixels = torch.rand(2, 3, *SIZE)
    for start in ({"pretrained": "timm"}, {"weights": tmp_path / "w.pth"}):
        student = models.create_student(3, SIZE, **start).eval().backbone
        student.fc = torch.nn.Identity()  # what it starts without
        features = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        assert torch.allclose(student(pixels), features, atol=1e-5)
    assert asked == [("resnet18.a1_in1k", True)]


# ---------------------------------------------------------------------------------------- ensemble


def test_soft_targets_are_the_product_of_experts_of_the_stored_logits(tiny):
    spec = load_ensemble(tiny.runs / "ensemble")
    cached = CachedLogits(tiny.runs / "ensemble", spec)
    assert cached.views == 3 and cached.logits[1].shape == (2, 105, 3)
    q = cached.targets([2, 1], [7, 100], 3.0)
    for row, view, index in ((0, 2, 7), (1, 1, 100)):
        z = np.load(tiny.runs / "ensemble" / f"view_{view:03d}.npy")[:, index].astype(np.float64)
        together = 0
        for logits, t, weight in zip(z, spec["temperatures"], spec["weights"]):
            together = together + weight * logits / t
        e = np.exp(together / 3)
        assert np.allclose(q[row], e / e.sum(), atol=1e-5)


def test_a_killed_build_goes_on_where_it_stopped(inside, tmp_path):
    words = ("--views", 10, "-b", 8, *CPU, "--output")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, ROOT / "build_ensemble.py", *words, killed]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    while not (killed / "view_003.npy").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = {file.name: file.stat().st_mtime_ns for file in killed.glob("view_*.npy")}
    assert 3 <= len(done) < 10
    assert call(distill.main, killed, "--output", tmp_path / "s", *CPU) == 2  # unfinished
    assert call(build_ensemble.main, *words, killed) == 0
    assert call(build_ensemble.main, *words, whole) == 0
    for file in whole.iterdir():
        assert file.read_bytes() == (killed / file.name).read_bytes(), file.name
    for name, then in done.items():
        assert (killed / name).stat().st_mtime_ns == then


@pytest.mark.parametrize("dtype, wrong", [("usual", 1.0), ("float32", 0.1)])
def test_check_recomputes_stored_logits_and_refuses_wrong_ones(
    inside, tmp_path, capfd, monkeypatch, dtype, wrong
):
    """A wrong logit is told from rounding by the type that is computed in, be it bfloat16."""
    if dtype == "float32":
        monkeypatch.setattr(models, "precision", lambda device: None)
    assert call(build_ensemble.main, "--views", 3, "--output", tmp_path / "e", *CPU) == 0
    words = ("--check", 60, "-b", 7, "--output", tmp_path / "e", *CPU)
    assert call(build_ensemble.main, *words) == 0
    assert "60 stored picture-views recomputed" in capfd.readouterr().out
    for view in range(1, 4):
        logits = np.load(view_file(tmp_path / "e", view)) + np.float32(wrong)
        write_view(tmp_path / "e", view, logits)
    assert call(build_ensemble.main, *words) == 2
    assert "differ from the teachers'" in capfd.readouterr().err


def test_the_ensemble_can_be_asked_for_other_views_than_the_teachers_saw(inside, tmp_path):
    wide, usual = tmp_path / "wide", inside.runs / "ensemble"
    words = ("--views", 1, "--output", wide, "--view-recipe", "zoom_min=0.5", *CPU)
    assert call(build_ensemble.main, *words) == 0
    recipe, before = (load_ensemble(folder)["view_recipe"] for folder in (wide, usual))
    assert recipe == {**before, "zoom_min": 0.5} and recipe != before
    a, b = (np.load(folder / "view_001.npy") for folder in (wide, usual))
    assert np.abs(a - b).max() > 0.1


def test_a_teacher_that_was_trained_on_other_views_is_named(inside, tmp_path, capfd):
    words = (*TRAIN, "--model", "test_resnet", "--steps", 2, "--view-recipe", "rotate=90", *CPU)
    assert call(train_teacher.main, *words, "--output", tmp_path) == 0
    teachers = ("runs/test_vit/model.pt", tmp_path / "test_resnet" / "model.pt")
    words = ("--views", 1, "--unlabelled", "none", "--output", tmp_path / "e", *CPU)
    assert call(build_ensemble.main, *teachers, *words) == 0
    said = capfd.readouterr().out
    assert f"views as {teachers[0]} saw them; {teachers[1]} was trained on others" in said


def test_logits_in_float16_take_half_the_space_and_give_nearly_the_same_targets(
    inside, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "precision", lambda device: None)  # bfloat16 would fit in exactly
    half, whole = tmp_path / "half", tmp_path / "whole"
    words = ("--output", half, *CPU)
    assert call(build_ensemble.main, "--views", 3, *CPU, "--output", whole) == 0
    assert call(build_ensemble.main, "--views", 3, "--dtype", "float16", *words) == 0
    assert call(build_ensemble.main, "--check", 60, *words) == 0
    assert call(build_ensemble.main, "--views", 3, *words) == 2  # an ensemble of another dtype
    specs = [load_ensemble(folder) for folder in (half, whole)]
    assert [spec["dtype"] for spec in specs] == ["float16", "float32"]
    assert np.load(half / "view_001.npy").dtype == np.float16

    everything = np.arange(105)
    views = 1 + everything % 3
    cached = [CachedLogits(*pair) for pair in zip((half, whole), specs)]
    for T in (1.0, 2.0):
        rounded, exact = (logits.targets(views, everything, T) for logits in cached)
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        assert (rounded - exact).abs().max() < 1e-3


def test_the_ensemble_lists_label_errors_by_path(tmp_path, monkeypatch, capfd):
    parts = make_set(tmp_path / "parts", {"train": 24, "val": 8, "test": 2})
    (parts / "train" / "level" / "l003.png").rename(parts / "train" / "upright" / "wrong.png")
    monkeypatch.chdir(tmp_path)
    words = (*TRAIN, "--model", "test_resnet", "--steps", 125, "-b", 16)
    assert call(train_teacher.main, *words, *CPU) == 0
    assert call(build_ensemble.main, "--views", 1, *CPU) == 0
    label_errors = load_ensemble(tmp_path / "runs" / "ensemble")["label_errors"]
    assert "train/upright/wrong.png" in [each["picture"] for each in label_errors["train"]]
    assert "in train: " in capfd.readouterr().out


# ---------------------------------------------------------------------------------------- evaluate


def test_metrics_file_has_the_promised_keys_and_agrees_with_itself(tiny):
    report = read_report(tiny.runs / "report")
    expected = [f"runs/{name}/model.pt" for name in sorted(TEACHERS)]
    expected += ["runs/ensemble", "runs/alone/model.pt", "runs/student/model.pt"]
    expected += ["runs/student/student.int8.ts", "runs/student/student.ts"]  # not the baseline's
    assert list(report["models"]) == expected
    for model in report["models"].values():
        assert set(model["sets"]) == {"test", "test_other"}
        accuracies = [s["accuracy"] for s in model["sets"].values()]
        assert model["mean_accuracy"] == pytest.approx(np.mean(accuracies))
        for name, n in (("test", 60), ("test_other", 36)):
            s = model["sets"][name]
            assert s["n"] == n == np.sum(s["confusion_matrix"])
            assert s["accuracy"] == pytest.approx(np.trace(s["confusion_matrix"]) / n)
            wanted = {"balanced_accuracy", "macro_f1", "nll", "ece", "auroc", "minus_baseline"}
            assert wanted <= set(s)  # the student was told which class is good
    assert report["models"]["runs/student/student.ts"]["latency_device"] == "cpu"


def test_an_ensemble_is_measured_as_it_teaches(tiny):
    spec, p = load_ensemble(tiny.runs / "ensemble"), {}
    with open(tiny.runs / "report" / "predictions.csv", newline="") as file:
        for row in csv.DictReader(file):
            its = [float(row[f"p_{name}"]) for name in spec["dataset"]["classes"]]
            p.setdefault(row["model"], []).append(its)
    z = [np.log(np.maximum(p[teacher["path"]], 1e-7)) for teacher in spec["teachers"]]
    q = np.exp(sum(w * each / T for w, T, each in zip(spec["weights"], spec["temperatures"], z)))
    assert np.allclose(q / q.sum(1, keepdims=True), p["runs/ensemble"], atol=1e-3)


def test_predictions_hold_every_picture_of_every_model_and_agree_with_the_scores(tiny):
    report = read_report(tiny.runs / "report")
    with open(tiny.runs / "report" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["models"]) * 96
    for name, model in report["models"].items():
        mine = [row for row in rows if row["model"] == name and row["set"] == "test"]
        right = [row["label"] == row["prediction"] for row in mine]
        assert np.mean(right) == pytest.approx(model["sets"]["test"]["accuracy"])
        good = [float(row["p_level"]) for row in mine if row["label"] == "level"]
        bad = [float(row["p_level"]) for row in mine if row["label"] != "level"]
        pairs = [(b < g) + (b == g) / 2 for b in bad for g in good]
        assert np.mean(pairs) == pytest.approx(model["sets"]["test"]["auroc"], abs=1e-3)
        for row in mine:
            assert (tiny.data / row["path"]).is_file()
            p = {c: float(row[f"p_{c}"]) for c in report["classes"]}
            assert sum(p.values()) == pytest.approx(1, abs=1e-5)
            assert p[row["prediction"]] == max(p.values())


def test_evaluate_says_of_an_exported_file_what_infer_says(tiny):
    with open(tiny.runs / "report" / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "runs/student/student.ts"]
    words = ["--model", "runs/student/student.ts", "--json", "parts/test", "parts/test_other"]
    command = [sys.executable, str(ROOT / "infer.py"), *words]
    run = subprocess.run(command, cwd=tiny.root, capture_output=True, text=True, check=True)
    verdicts = {}
    for verdict in map(json.loads, run.stdout.splitlines()):
        verdicts[verdict["path"].removeprefix("parts/")] = verdict
    assert len(rows) == len(verdicts) == 96
    for row in rows:
        verdict = verdicts[row["path"]]
        assert row["prediction"] == verdict["class"]
        for name, p in verdict["probabilities"].items():
            assert float(row[f"p_{name}"]) == pytest.approx(p, abs=1e-4)


def test_a_data_folder_may_move_with_its_pool(inside, tmp_path, capfd):
    shutil.copytree("parts", tmp_path / "moved")
    for name in ("ensemble", "student"):
        shutil.copytree(f"runs/{name}", tmp_path / name)
    (inside.data / "unlabelled").rename(inside.data / "gone")
    try:
        words = ("--data-dir", tmp_path / "moved", *CPU)
        ensemble, student = tmp_path / "ensemble", tmp_path / "student"
        assert call(build_ensemble.main, "--views", 3, "--output", ensemble, *words) == 0
        assert "0 of them to be computed" in capfd.readouterr().out
        resume = ("--steps", 105, "-b", 16, "--resume", "--output", student)
        assert call(distill.main, ensemble, *resume, *words) == 0
        assert call(evaluate.main, ensemble, "--output", tmp_path / "r", *words) == 0
    finally:
        (inside.data / "gone").rename(inside.data / "unlabelled")
    assert read_report(tmp_path / "r")["audit"]["sizes"]["unlabelled"] == 48


def test_evaluate_takes_any_mix_and_names_sets_by_path_when_names_collide(inside, tmp_path):
    make_set(tmp_path / "others", {"test": 3}, seed=1)
    other = str(tmp_path / "others" / "test")
    tests = ("--test-dirs", "parts/test", other, "--baseline", inside.runs / "ensemble")
    words = ("runs/student/student.ts", "runs/ensemble", *tests, "--output", tmp_path, *CPU)
    assert call(evaluate.main, *words, "--skip-audit") == 0
    report = read_report(tmp_path)
    assert list(report["models"]) == ["runs/student/student.ts", "runs/ensemble"]
    sets = report["models"]["runs/ensemble"]["sets"]
    assert set(sets) == {"parts/test", other} and report["audit"] is None


@pytest.mark.parametrize("size", [VIEW_SIZE, 40])
def test_a_model_of_other_training_pictures_is_named(size, inside, tmp_path, capfd):
    make_set(tmp_path / "others", {"train": 6}, seed=1)
    words = ("--data-dir", tmp_path / "others", "--view-size", size, "--model", "test_resnet")
    assert call(train_teacher.main, *words, "--steps", 2, "--output", tmp_path, *CPU) == 0
    other = tmp_path / "test_resnet" / "model.pt"
    tests = ("--test-dirs", "parts/test", "--skip-audit", "--output", tmp_path / "r")
    assert call(evaluate.main, "runs/student/model.pt", "runs/ensemble", other, *tests, *CPU) == 0
    line = f"{other.as_posix()}: trained on other pictures than the models before"
    assert f"audit: {line}" in capfd.readouterr().out
    (told,) = read_report(tmp_path / "r")["audit_lines"]
    assert told.startswith(line) and line in (tmp_path / "r" / "report.html").read_text("utf-8")


def test_the_folder_one_stands_in_is_a_test_set_of_its_own_name(inside, tmp_path, monkeypatch):
    monkeypatch.chdir("parts/test")
    dataset = {**DATASET, "classes": ["cross", "level", "upright"]}
    ((name, pictures),) = splits.open_tests(DecodedCache(tmp_path), ["."], dataset).items()
    assert name == "test" and pictures.path(0) == "test/cross/c000.png"


def test_a_model_of_another_input_size_is_measured_on_its_own_views(
    inside, tmp_path, monkeypatch
):
    pictures = ("--data-dir", "parts", "--view-size", 48, "--img-size", 40)
    words = (*pictures, "--model", "test_resnet", "--steps", 2, "--output", tmp_path)
    assert call(train_teacher.main, *words, *CPU) == 0
    checkpoint = tmp_path / "test_resnet" / "model.pt"
    words = (checkpoint, "runs/student/model.pt", "--data-dir", "parts", "--output", tmp_path / "r")
    assert call(evaluate.main, *words, "--skip-audit", *CPU) == 0
    real, sizes = evaluate.audit.audit, set()

    def audit(cache, dataset, sets):
        sizes.update(tuple(each.view_size) for each in sets.values())
        return real(cache, dataset, sets)

    monkeypatch.setattr(evaluate.audit, "audit", audit)
    words = ("runs/student/student.ts", checkpoint, "--output", tmp_path / "r2")
    assert call(evaluate.main, *words, *CPU) == 0
    assert sizes == {(48, 48)}  # else copies of pictures are not told
    assert load_checkpoint(checkpoint)["img_size"] == [40, 40]
    dataset = {**DATASET, "view_size": [48, 48], "classes": ["cross", "level", "upright"]}
    alone = splits.open_tests(DecodedCache(tmp_path / "d"), ["parts/test"], dataset)
    model, _ = models.load_model(checkpoint, torch.device("cpu"))
    logits = models.predict(model, alone["test"], torch.device("cpu"))
    accuracy = float((logits.argmax(1) == alone["test"].labels).float().mean())
    report = read_report(tmp_path / "r")["models"][str(checkpoint)]
    assert report["sets"]["test"]["accuracy"] == pytest.approx(accuracy)
