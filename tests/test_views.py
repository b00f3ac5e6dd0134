"""A view is a pure function of picture, index, view number and seed."""

import numpy as np
import pytest
import torch

import build_ensemble
import distill
import train_teacher
from common import data, views
from common.losses import distillation_loss
from common.views import ViewRecipe, _mix, batch_plan, mixup_partners, render, render_blended, uniform
from conftest import SIDE, call

RECIPE = ViewRecipe()
STILL = dict(zoom_min=1, zoom_max=1, shift=0, rotate=0, flip=0, brightness=0, contrast=0, tint=0)


def pictures(count=12, side=32):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_generator_is_splitmix64():
    # The first two outputs of the reference implementation for seed 0.
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden, 2 * golden % 2**64], np.uint64)
    assert [hex(v) for v in _mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_numbers_are_uniform_and_change_with_every_counter():
    u = uniform(0, np.arange(2000), np.zeros(2000, int), 11)
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12 ** -0.5) < 0.01
    one = uniform(0, [3], [17], 11)
    for other in (uniform(1, [3], [17], 11), uniform(0, [4], [17], 11), uniform(0, [3], [18], 11)):
        assert not np.isclose(one, other).any()
    assert np.abs(np.corrcoef(u.T) - np.eye(11)).max() < 0.1


def test_a_view_does_not_depend_on_order_or_batch_size():
    x, index, view = pictures(), np.arange(12), np.arange(12) % 4
    together = render(x, index, view, 7, RECIPE)
    order = np.random.default_rng(1).permutation(12)
    assert torch.equal(render(x[order], index[order], view[order], 7, RECIPE), together[order])
    alone = torch.cat([render(x[i:i + 1], index[i:i + 1], view[i:i + 1], 7, RECIPE) for i in range(12)])
    assert torch.equal(alone, together)


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


def test_contrast_turns_about_the_mean_and_brightness_shifts_it():
    x = (pictures(1, 16) // 4 + 96)  # far from 0 and 255, so that nothing is clipped
    plain = x.permute(0, 3, 1, 2).float()
    more = render(x, [0], [1], 0, ViewRecipe(**{**STILL, "contrast": 0.5}))
    assert torch.allclose(more.mean(), plain.mean(), atol=1e-2)
    gain = more.std() / plain.std()
    assert 0.5 <= gain <= 1.5 and abs(gain - 1) > 1e-3
    shift = render(x, [0], [1], 0, ViewRecipe(**{**STILL, "brightness": 0.1})) - plain
    assert shift.std() < 1e-2 and 0.01 < shift.abs().mean() <= 25.5


class Pile:
    """What render_blended asks of data.Pictures."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batch(self, indices, device):
        return self.images[indices]


def test_a_blend_is_the_mean_of_two_views_weighted_towards_its_own_picture():
    x, index, view = pictures(), np.arange(12), np.array([0, 1, 2] * 4)
    together, blended = render_blended(Pile(x), index, view, 7, RECIPE, 1.0, "cpu")
    assert blended.tolist() == (view > 0).tolist()
    partners, own = mixup_partners(12, index, view, 7, 1.0)
    for i in index:
        mine, theirs = (render(x[j:j + 1], [j], view[i:i + 1], 7, RECIPE)[0] for j in (i, partners[i]))
        expected = mine if view[i] == 0 else own[i] * mine + (1 - own[i]) * theirs
        assert torch.allclose(together[i], expected, atol=1e-3)
        assert torch.equal(together[i], render_blended(Pile(x), index[i:i + 1], view[i:i + 1], 7, RECIPE, 1.0, "cpu")[0][0])
    assert torch.equal(render_blended(Pile(x), index, view, 7, RECIPE, 0.0, "cpu")[0], render(x, index, view, 7, RECIPE))


def test_blends_are_as_frequent_as_asked_and_of_any_partner():
    partners, own = mixup_partners(10, np.arange(5000), np.ones(5000, int), 0, 0.3)
    assert abs((own < 1).mean() - 0.3) < 0.02
    assert own.min() >= 0.5 and abs(own[own < 1].mean() - 0.75) < 0.01
    assert (np.bincount(partners, minlength=10) > 400).all() and partners.max() == 9


def test_each_pass_visits_every_picture_once_and_a_later_start_gives_the_same_batches():
    plan = list(batch_plan(10, 4, 3, 0, 10))
    indices, passes = np.concatenate([i for i, _ in plan]), np.concatenate([p for _, p in plan])
    assert all(len(i) == 4 for i, _ in plan)
    for number in range(4):
        assert sorted(indices[passes == number]) == list(range(10))
    for (a, p), (b, q) in zip(plan[6:], batch_plan(10, 4, 3, 6, 4)):
        assert (a == b).all() and (p == q).all()


@pytest.mark.parametrize("mixup", [0, 0.6])
def test_the_student_is_taught_with_the_pixels_the_teachers_answered(inside, monkeypatch, tmp_path, mixup):
    seen = {"teachers": {}, "student": {}}

    def recorder(who):
        def recording(pictures, indices, views, *rest):
            pixels, blended = render_blended(pictures, indices, views, *rest)
            for i, v, p in zip(indices, views, pixels):
                seen[who][int(i), int(v)] = p.numpy().tobytes()
            return pixels, blended
        return recording

    monkeypatch.setattr(build_ensemble, "render_blended", recorder("teachers"))
    monkeypatch.setattr(distill, "render_blended", recorder("student"))
    assert call(build_ensemble.main, "--views", 2, "-b", 25, "--mixup", mixup, "--output", tmp_path / "ensemble", "--device", "cpu") == 0
    assert call(distill.main, tmp_path / "ensemble", "--epochs", 2, "-b", 16, "--output", tmp_path / "s", "--device", "cpu") == 0
    assert {view for _, view in seen["student"]} == {1, 2}
    assert len({index for index, _ in seen["student"]}) == 57 + 48  # labelled less held out, and the pool
    assert all(seen["teachers"][key] == pixels for key, pixels in seen["student"].items())
    assert len(next(iter(seen["student"].values()))) == 4 * 3 * SIDE * SIDE


def test_a_blend_has_no_label_but_the_teachers_and_the_baseline_sees_none(inside, monkeypatch, tmp_path):
    known = {0: [], 0.9: []}

    def recording(logits, labels, soft, alpha, tau, weights):
        known[alpha] += labels.tolist()
        return distillation_loss(logits, labels, soft, alpha, tau, weights)

    monkeypatch.setattr(distill, "distillation_loss", recording)
    words = ("--views", 2, "--mixup", 0.5, "--unlabelled", "none", "--output", tmp_path / "e", "--device", "cpu")
    assert call(build_ensemble.main, *words) == 0
    for alpha in known:
        assert call(distill.main, tmp_path / "e", "--alpha", alpha, "--epochs", 2, "-b", 19, "--output", tmp_path / "s", "--overwrite", "--device", "cpu") == 0
    blended = [mixup_partners(57, np.arange(57), np.full(57, view), 0, 0.5)[1] < 1 for view in (1, 2)]
    assert known[0.9].count(data.UNLABELLED) == np.sum(blended) > 30
    assert len(known[0]) == 114 and data.UNLABELLED not in known[0]


def test_a_teacher_trains_on_the_same_views(inside, monkeypatch, tmp_path):
    seen = {}

    def recording(x, indices, views, seed, recipe):
        pixels = render(x, indices, views, seed, recipe)
        seen.update({(int(i), int(v)): p for i, v, p in zip(indices, views, pixels)})
        return pixels

    monkeypatch.setattr(train_teacher, "render", recording)
    words = ("--data-dir", "parts", "--view-size", SIDE, "--model", "test_resnet", "--epochs", 1, "--device", "cpu")
    assert call(train_teacher.main, *words, "--output", tmp_path) == 0
    trained = dict(seen)
    monkeypatch.setattr(views, "render", recording)
    assert call(build_ensemble.main, tmp_path / "test_resnet" / "best.pt", "--views", 1, "--unlabelled", "none", "--mixup", 0,
                "--output", tmp_path / "e", "--device", "cpu") == 0
    assert len(trained) > 50
    assert all(torch.equal(seen[key], pixels) for key, pixels in trained.items())
