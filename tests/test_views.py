"""A view is a pure function of picture, index, view number and seed."""

import numpy as np
import pytest
import torch
from conftest import CPU, VIEW_SIZE, call

import build_ensemble
import distill
import train_teacher
from common import models, splits, training
from common.ensemble import load_ensemble
from common.pictures import DecodedCache
from common.training import Order
from common.views import ViewRecipe, mix, mixup, render, shares, uniform, warp

RECIPE = ViewRecipe()
STILL = dict(zoom_min=1, zoom_max=1, shift=0, rotate=0, flip=0, brightness=0, contrast=0, tint=0)


def pictures(count=12, side=32):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_generator_is_splitmix64():
    # The first two outputs of the reference implementation for seed 0.
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden, 2 * golden % 2**64], np.uint64)
    assert [hex(v) for v in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_numbers_are_uniform_and_change_with_every_counter():
    u = uniform(0, np.arange(2000), np.zeros(2000, int), 11)
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12 ** -0.5) < 0.01
    one = uniform(0, [3], [17], 11)
    for seed, view, index in ((1, 3, 17), (0, 4, 17), (0, 3, 18)):
        assert not np.isclose(one, uniform(seed, [view], [index], 11)).any()
    assert np.abs(np.corrcoef(u.T) - np.eye(11)).max() < 0.1


def test_a_view_does_not_depend_on_order_or_batch_size():
    x, index, view = pictures(), np.arange(12), np.arange(12) % 4
    together = render(x, index, view, 7, RECIPE)
    order = np.random.default_rng(1).permutation(12)
    shuffled = render(x[order], index[order], view[order], 7, RECIPE)
    assert torch.equal(shuffled, together[order])
    for i in range(12):
        alone = render(x[i : i + 1], [i], [view[i]], 7, RECIPE)
        assert torch.equal(alone[0], together[i])


def test_view_zero_is_the_plain_picture_also_beside_others():
    x = pictures(4)
    mixed = render(x, range(4), [0, 1, 0, 2], 7, RECIPE)
    plain = x.permute(0, 3, 1, 2).float()
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[2], plain[2])
    assert not torch.equal(mixed[1], plain[1])


def test_other_seed_other_view_other_index_give_other_pixels():
    x = pictures(1).expand(2, -1, -1, -1)
    base = render(x, [5, 6], [1, 1], 0, RECIPE)
    assert not torch.allclose(base[0], base[1], atol=1)
    assert not torch.allclose(base[0], render(x, [5, 6], [2, 2], 0, RECIPE)[0], atol=1)
    assert not torch.allclose(base[0], render(x, [5, 6], [1, 1], 1, RECIPE)[0], atol=1)


def test_still_recipe_returns_the_picture_and_both_flips_turn_it_upside_down():
    x = pictures(2)
    plain = x.permute(0, 3, 1, 2).float()
    assert torch.allclose(render(x, [0, 1], [1, 1], 0, ViewRecipe(**STILL)), plain, atol=1e-2)
    flipped = render(x, [0, 1], [1, 1], 0, ViewRecipe(**{**STILL, "flip": 1}))
    assert torch.allclose(flipped, plain.flip(2, 3), atol=1e-2)


def test_a_turn_of_a_rectangle_does_not_shear():
    # A round spot stays round at every angle; turned in coordinates that run from -1 to 1 along
    # both sides, it would become an ellipse.
    y, x = np.ogrid[-29.5:30, -59.5:60]
    spot = torch.from_numpy(255 * np.exp(-(x**2 + y**2) / 200)).to(torch.uint8)
    pictures = spot[None, :, :, None].repeat(40, 1, 1, 3)
    turned = render(pictures, range(40), [1] * 40, 0, ViewRecipe(**{**STILL, "rotate": 180}))
    inside = torch.from_numpy(x**2 + y**2 < 29**2)  # beyond, a turn looks past the short side
    assert (turned - spot)[:, :, inside].abs().max() < 4


def test_a_quarter_turn_of_a_rectangle_moves_a_point_as_far_as_it_was_from_the_middle():
    u = np.full((1, 11), 0.5)
    u[0, 0] = 1.0  # the whole angle
    m = warp(u, ViewRecipe(**{**STILL, "rotate": 90}), 41, 81)[0].reshape(2, 3)
    # the output 15 px above the middle, in coordinates of -1 to 1, looks 15 px right of the middle
    source = m @ [0, -15 / 20.5, 1]
    assert np.allclose(source * [40.5, 20.5], [15, 0], atol=1e-9)


def test_a_shift_is_as_many_pixels_in_both_directions():
    u = np.ones((1, 11))
    recipe = ViewRecipe(**{**STILL, "shift": 0.1})
    for height, width in ((80, 200), (200, 80), (64, 64)):
        m = warp(u, recipe, height, width)[0]
        pixels = m[2] * width / 2, m[5] * height / 2
        assert np.allclose(pixels, 0.1 * min(height, width) / 2)


def test_squares_keep_the_pixels_that_they_had():
    # As rendered before views had two sides (commit 87931ae).
    x = torch.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3).to(torch.uint8)
    views = render(x, [3, 4], [1, 2], 7, RECIPE)
    found = [views[0, 0, 0, 0], views[0, 1, 3, 4], views[1, 2, 7, 7], views.mean()]
    assert [round(float(value), 3) for value in found] == [0.0, 71.206, 217.296, 107.172]


def test_contrast_turns_about_the_mean_and_brightness_shifts_it():
    x = (pictures(1, 16) // 4 + 96)  # far from 0 and 255, so that nothing is clipped
    plain = x.permute(0, 3, 1, 2).float()
    more = render(x, [0], [1], 0, ViewRecipe(**{**STILL, "contrast": 0.5}))
    assert torch.allclose(more.mean(), plain.mean(), atol=1e-2)
    gain = more.std() / plain.std()
    assert 0.5 <= gain <= 1.5 and abs(gain - 1) > 1e-3
    shift = render(x, [0], [1], 0, ViewRecipe(**{**STILL, "brightness": 0.1})) - plain
    assert shift.std() < 1e-2 and 0.01 < shift.abs().mean() <= 25.5


def test_mixup_adds_shares_of_a_row_and_of_the_one_before():
    rows, share = torch.tensor([[0.0, 8.0], [4.0, 0.0], [8.0, 8.0]]), torch.tensor([1.0, 0.25, 0.5])
    assert mixup(rows, share).tolist() == [[0.0, 8.0], [1.0, 6.0], [6.0, 4.0]]
    pixels = torch.rand(3, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    both = mixup(pixels, share)
    assert torch.allclose(both[2], (pixels[2] + pixels[1]) / 2)
    assert both.is_contiguous(memory_format=torch.channels_last)


def test_shares_are_uniform_and_a_pure_function_of_seed_and_step():
    u = shares(3, 7, 10_000)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.01 and abs(float(u.std()) - 12**-0.5) < 0.01
    assert torch.equal(u, shares(3, 7, 10_000))
    assert not torch.equal(u, shares(3, 8, 10_000)) and not torch.equal(u, shares(4, 7, 10_000))


def test_each_pass_visits_every_picture_once():
    order = Order(torch.zeros(10, dtype=torch.int64), 3)
    plan = [order.batch(step, 4) for step in range(10)]
    indices, passes = np.concatenate([i for i, _ in plan]), np.concatenate([p for _, p in plan])
    assert all(len(i) == 4 for i, _ in plan)
    for number in range(4):
        assert sorted(indices[passes == number]) == list(range(10))


def test_balanced_classes_are_seen_alike_and_a_pool_keeps_its_share():
    labels = torch.tensor([0] * 12 + [1] * 3 + [-1] * 5)
    indices, passes = Order(labels, 3, balanced=True).batch(0, 80)  # 4 times 20 places
    seen = labels[indices].numpy()
    assert [(seen == k).sum() for k in (-1, 0, 1)] == [20, 30, 30]
    # Each class is gone through pass after pass: 30 places are 10 passes over 3 pictures.
    assert sorted(zip(passes[seen == 1], indices[seen == 1])) == [
        (number, i) for number in range(10) for i in (12, 13, 14)
    ]
    for number in range(2):
        assert sorted(indices[(seen == 0) & (passes == number)]) == list(range(12))


def test_each_of_two_processes_sees_both_balanced_classes():
    labels = torch.tensor([0] * 12 + [1] * 3)
    indices, _ = Order(labels, 3, balanced=True).batch(0, 48)
    assert set(labels[indices[::2]].tolist()) == {0, 1} == set(labels[indices[1::2]].tolist())


def recorder(seen):
    """`render`, keeping {(index, view): pixels} in `seen`."""

    def recording(pictures, indices, views, seed, recipe):
        pixels = render(pictures, indices, views, seed, recipe)
        for i, view, picture in zip(indices, views, pixels):
            seen[int(i), int(view)] = picture.numpy().copy()
        return pixels

    return recording


def test_the_student_is_taught_with_the_pixels_the_teachers_answered(
    inside, no_export, monkeypatch, tmp_path
):
    asked, taught = {}, {}
    monkeypatch.setattr(build_ensemble, "render", recorder(asked))
    monkeypatch.setattr(distill, "render", recorder(taught))
    words = ("--views", 2, "-b", 25, "--view-recipe", "zoom_min=0.5")
    words += ("--output", tmp_path / "ensemble")
    assert call(build_ensemble.main, *words, *CPU) == 0
    words = ("--steps", 14, "-b", 16, "--output", tmp_path / "s")
    assert call(distill.main, tmp_path / "ensemble", *words, *CPU) == 0
    assert {view for _, view in taught} == {1, 2}
    assert len({index for index, _ in taught}) == 57 + 48  # labelled less held out, and the pool
    for key, pixels in taught.items():
        assert (asked[key] == pixels).all()


def test_the_stand_alone_student_sees_labelled_pictures_alone_in_new_views(
    inside, no_export, monkeypatch, tmp_path
):
    seen = {}
    monkeypatch.setattr(distill, "render", recorder(seen))
    words = ("--alpha", 0, "--steps", 15, "-b", 19, "--output", tmp_path)  # five passes
    assert call(distill.main, *words, *CPU) == 0
    assert set(seen) == {(index, view) for index in range(57) for view in range(1, 6)}


def test_a_teacher_learns_the_views_of_its_recipe(inside, monkeypatch, tmp_path):
    seen, still = {}, [f"{name}={value}" for name, value in STILL.items()]
    monkeypatch.setattr(train_teacher, "render", recorder(seen))
    words = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_resnet")
    words += ("--steps", 1, "--view-recipe", *still, "--output", tmp_path)
    assert call(train_teacher.main, *words, *CPU) == 0
    dataset = models.load_checkpoint(tmp_path / "test_resnet" / "model.pt")["dataset"]
    train, _, _ = splits.open_training(DecodedCache("runs/decoded"), dataset)
    for (index, _), pixels in seen.items():
        plain = train.batch([index])[0].permute(2, 0, 1).float().numpy()
        assert np.abs(pixels - plain).max() < 0.1


def test_no_view_of_the_ensemble_is_one_that_a_teacher_was_trained_on(
    inside, monkeypatch, tmp_path
):
    trained, asked = {}, {}
    monkeypatch.setattr(train_teacher, "render", recorder(trained))
    monkeypatch.setattr(build_ensemble, "render", recorder(asked))
    words = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_resnet",
             "--steps", 8)
    assert call(train_teacher.main, *words, "-b", 16, "--output", tmp_path, *CPU) == 0
    words = ("--views", 2, "--unlabelled", "none", "--output", tmp_path / "e")
    assert call(build_ensemble.main, tmp_path / "test_resnet" / "model.pt", *words, *CPU) == 0
    both = {key for key in trained if key[1] > 0} & set(asked)
    assert len(both) > 57
    for key in both:
        assert np.abs(asked[key] - trained[key]).max() > 1


def test_balance_classes_draws_as_many_of_each_in_both_trainings(
    inside, no_export, monkeypatch, tmp_path, capfd
):
    batches = []

    def recording(pictures, indices, *rest):
        batches.append(indices)
        return render(pictures, indices, *rest)

    monkeypatch.setattr(train_teacher, "render", recording)
    monkeypatch.setattr(distill, "render", recording)
    biases = torch.tensor([0.0, 1e3, 0.0])
    monkeypatch.setattr(training, "fit_biases", lambda logits, labels, parts: biases)
    how = ("--steps", 4, "-b", 6, "--balance-classes", "--output", tmp_path / "run", *CPU)
    what = ("--data-dir", "parts", "--view-size", VIEW_SIZE, "--model", "test_resnet")
    assert call(train_teacher.main, *what, *how) == 0
    assert call(distill.main, "--alpha", 0, *how) == 0
    moved = "biases fitted on validation: cross +0.00, level +1000.00, upright +0.00"
    assert capfd.readouterr().out.count(moved) == 2
    for folder in ("run/test_resnet", "run"):  # biases are in the model, and in what it says
        state = models.load_checkpoint(tmp_path / folder / "model.pt")
        *_, last = state["state_dict"].values()
        assert last[1] > 900 > last[0]
        assert state["metrics"]["balanced_accuracy"] == pytest.approx(1 / 3)
    dataset = load_ensemble("runs/ensemble")["dataset"]
    train, _, _ = splits.open_training(DecodedCache("runs/decoded"), dataset)
    assert len(batches) == 8
    for indices in batches:
        assert train.labels[indices].bincount().tolist() == [2, 2, 2]
