"""Formulas of losses.py against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.losses import (
    fit_biases,
    fit_temperature,
    fit_weights,
    label_rows,
    labelled_cross_entropy,
    product_of_experts,
    soft_divergence,
)

LN3 = math.log(3)
HALF = torch.tensor([[0.5, 0.5]])


def test_divergence_is_kl_summed_over_classes_and_averaged_over_the_batch():
    # softmax of (ln 3, 0) is (3/4, 1/4); KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln(2/3) + 1/2 ln 2
    s = torch.tensor([[LN3, 0.0], [0.0, 0.0]])
    assert float(soft_divergence(HALF, s[:1])) == pytest.approx(0.5 * math.log(4 / 3))
    assert float(soft_divergence(HALF.expand(2, 2), s)) == pytest.approx(0.25 * math.log(4 / 3))


def test_gradient_of_the_softened_divergence_is_t_times_the_difference_of_probabilities():
    s = torch.tensor([[2 * LN3, 0.0], [2 * LN3, 0.0]], requires_grad=True)
    T = 2.0
    (T**2 * soft_divergence(HALF.expand(2, 2), s / T)).backward()
    expected = T * torch.tensor([[0.25, -0.25]]).expand(2, 2) / 2  # T (p - q), mean over 2
    assert torch.allclose(s.grad, expected, atol=1e-6)


def test_a_student_that_answers_the_target_has_no_divergence_and_no_gradient():
    s = torch.randn(4, 3, requires_grad=True)
    loss = soft_divergence(F.softmax(s.detach() / 3, dim=1), s / 3)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and s.grad.abs().max() < 1e-6


def test_unlabelled_pictures_have_no_cross_entropy():
    s = torch.randn(3, 4)
    one = labelled_cross_entropy(s, label_rows(torch.tensor([2, -1, -1]), 4))
    assert torch.allclose(one, F.cross_entropy(s[:1], torch.tensor([2])))
    assert labelled_cross_entropy(s, label_rows(torch.tensor([-1, -1, -1]), 4)) == 0


def test_with_all_labels_it_is_torchs_cross_entropy():
    s, y = torch.randn(32, 6, requires_grad=True), torch.randint(0, 6, (32,))
    rows = label_rows(y, 6)
    ours, plain = labelled_cross_entropy(s, rows), F.cross_entropy(s, rows)
    assert torch.equal(ours, plain)
    assert torch.equal(torch.autograd.grad(ours, s)[0], torch.autograd.grad(plain, s)[0])
    assert torch.allclose(plain, F.cross_entropy(s, y))  # which adds up in another order


def test_a_mixed_label_counts_by_its_shares():
    # A quarter of class 0, three quarters of a picture without a label: the rows sum to 1/4 and 1.
    s = torch.tensor([[LN3, 0.0], [0.0, 0.0]])
    rows = torch.tensor([[0.25, 0.0], [0.0, 1.0]])
    expected = 0.25 * math.log(4 / 3) + math.log(2)
    assert float(labelled_cross_entropy(s, rows)) == pytest.approx(expected / 1.25)


def test_the_ensemble_adds_weighted_logits_over_temperatures():
    z = torch.tensor([[[2 * LN3, 0.0]], [[0.0, LN3]]])
    # 2 ln 3 / 2 - 0.5 ln 3 = ln 3 / 2, so odds of sqrt 3.
    odds = 3**0.5
    expected = torch.tensor([[odds, 1.0]]) / (1 + odds)
    assert torch.allclose(product_of_experts(z, [2.0, 1.0], [1.0, 0.5]), expected, atol=1e-6)
    softer = product_of_experts(z, [1.0, 0.5], [1.0, 0.5], T=2.0)
    assert torch.allclose(softer, expected, atol=1e-6)


def test_fitted_temperature_makes_confidence_equal_accuracy_with_each_label_held_likely():
    # Always (2, 0), right three times of four, each label counting 5/6:
    # (3 * 5/6 + 1/6) / 4 = 2/3, so 2 / T = ln 2.
    logits, labels = torch.tensor([[2.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(2), rel=1e-4)


def test_a_model_without_a_mistake_keeps_a_soft_temperature():
    # Each of 4 labels counts 5/6: sigmoid(2 / T) = 5/6.
    logits, labels = torch.tensor([[2.0, 0.0]] * 4), torch.zeros(4, dtype=torch.long)
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(5), rel=1e-4)


def test_fitted_biases_make_classes_weigh_alike_against_a_prior():
    # Always (2, 0), T = 2 / ln 2 as above. Three pictures of class 0 count as the one of class 1,
    # so the slopes are 2 (sigmoid(ln 2 + 2 b) - 1/2) of NLL and b of the prior.
    logits, labels = torch.tensor([[2.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
    T = 2 / math.log(2)
    by = fit_biases(logits, labels, range(4)).tolist()
    b = by[0] / T
    assert -math.log(2) / 2 < b < 0 and by[1] == pytest.approx(-by[0], abs=1e-5)
    assert b == pytest.approx(1 - 2 / (1 + math.exp(-math.log(2) - 2 * b)), abs=1e-4)


def test_of_many_parts_the_prior_of_biases_is_nothing():
    # As above 1000 times: no class is preferred any more, so the gap of 2 is closed.
    logits, labels = torch.tensor([[2.0, 0.0]]).expand(4000, 2), torch.tensor([0, 0, 0, 1] * 1000)
    assert fit_biases(logits, labels, range(4000)).tolist() == pytest.approx([-1, 1], abs=0.01)


def test_many_pictures_of_four_parts_move_biases_like_four_pictures():
    # The same pictures of 3 parts of class 0 and one of class 1; here T = 2 / ln 3, nearly.
    logits, labels = torch.tensor([[2.0, 0.0]]).expand(4000, 2), torch.tensor([0, 0, 0, 1] * 1000)
    b = float(fit_biases(logits, labels, [0, 1, 2, 3] * 1000)[0]) * math.log(3) / 2
    assert b == pytest.approx(1 - 2 / (1 + math.exp(-math.log(3) - 2 * b)), abs=1e-3)


def test_fitted_weights_count_what_each_teacher_knows_alone():
    # Each teacher says (1, 0) of four pictures of its own and nothing of the others. Each of 8
    # labels counts 0.9, so right 3 times of 4 is a share of (3 * 0.9 + 0.1) / 4 = 0.7, w = ln 7/3;
    # always right is 0.9, w = ln 9. A third teacher says nothing and gets nothing.
    z = torch.zeros(3, 8, 2)
    z[0, :4, 0] = z[1, 4:, 0] = 1.0
    weights = fit_weights(z, torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]), prior=0)
    assert weights == pytest.approx([math.log(7 / 3), math.log(9), 0.0], abs=1e-6)


def test_two_teachers_that_say_the_same_share_one_weight():
    z = torch.tensor([[2.0, 0.0]]).expand(4, 2)  # of one teacher: w = ln 2 / 2, see above
    weights = fit_weights(torch.stack([z, z]), torch.tensor([0, 0, 0, 1]))
    assert sum(weights) == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_a_strong_prior_makes_weights_equal_and_leaves_their_sum_free():
    # As above without the third teacher. Equal weights: of the sum's mean slope over 8 pictures,
    # sigmoid(w) = (0.7 + 0.9) / 2 = 0.8, so w = ln 4.
    z = torch.zeros(2, 8, 2)
    z[0, :4, 0] = z[1, 4:, 0] = 1.0
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])
    assert fit_weights(z, labels, prior=1e6) == pytest.approx([math.log(4)] * 2, abs=1e-4)
    weak, strong = fit_weights(z, labels, prior=1)
    assert math.log(7 / 3) < weak < math.log(4) < strong < math.log(9)
    # The slopes of 8 NLL and of the prior, (w_t - mean) of both, are in balance.
    half_gap = (strong - weak) / 2
    assert 4 * (0.9 - 1 / (1 + math.exp(-strong))) == pytest.approx(half_gap, abs=1e-4)
    assert 4 * (1 / (1 + math.exp(-weak)) - 0.7) == pytest.approx(half_gap, abs=1e-4)
