"""Formulas of losses.py and calibration.py against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.calibration import fit_temperature, fit_weights
from common.losses import class_weights, labelled_cross_entropy, mixture, soft_divergence

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
    one = labelled_cross_entropy(s, torch.tensor([2, -1, -1]))
    assert torch.allclose(one, F.cross_entropy(s[:1], torch.tensor([2])))
    assert labelled_cross_entropy(s, torch.tensor([-1, -1, -1])) == 0


def test_with_all_labels_it_is_torchs_cross_entropy_bit_for_bit():
    s, y = torch.randn(32, 6, requires_grad=True), torch.randint(0, 6, (32,))
    ours, plain = labelled_cross_entropy(s, y), F.cross_entropy(s, y)
    assert torch.equal(ours, plain)
    assert torch.equal(torch.autograd.grad(ours, s)[0], torch.autograd.grad(plain, s)[0])


def test_balanced_classes_weigh_alike_and_unlabelled_pictures_do_not_count():
    weights = class_weights(torch.tensor([0, 0, 0, 1]), 2)
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])
    s = torch.tensor([[LN3, 0.0]]).expand(5, 2)  # CE is ln 4/3 for class 0, ln 4 for class 1
    loss = labelled_cross_entropy(s, torch.tensor([0, 0, 0, 1, -1]), weights)
    assert float(loss) == pytest.approx((3 * 4 / 6 * math.log(4 / 3) + 2 * math.log(4)) / 4)


def test_mixture_is_over_probabilities_with_temperatures():
    # softened by T = 2: (3/4, 1/4) and (1/2, 1/2)
    z = torch.tensor([[[2 * LN3, 0.0]], [[0.0, 0.0]]])
    expected = torch.tensor([[0.7, 0.3]])
    assert torch.allclose(mixture(z, [2.0, 1.0], [0.8, 0.2]), expected, atol=1e-6)
    assert torch.allclose(mixture(z, [1.0, 1.0], [0.8, 0.2], T=2.0), expected, atol=1e-6)


def test_fitted_temperature_makes_confidence_equal_accuracy_with_each_label_held_likely():
    # Always (2, 0), right three times of four, each label counting 5/6:
    # (3 * 5/6 + 1/6) / 4 = 2/3, so 2 / T = ln 2.
    logits, labels = torch.tensor([[2.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(2), rel=1e-4)


def test_a_model_without_a_mistake_keeps_a_soft_temperature():
    # Each of 4 labels counts 5/6: sigmoid(2 / T) = 5/6.
    logits, labels = torch.tensor([[2.0, 0.0]] * 4), torch.zeros(4, dtype=torch.long)
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(5), rel=1e-4)


def test_fitted_weights_minimise_the_nll_of_the_mixture_and_one_imagined_picture_each():
    p = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]])
    assert fit_weights(p, torch.tensor([0, 0])) == pytest.approx([0.5, 0.5])
    # Slope of 2 ln(0.1 + 0.8 w) + ln w + ln(1 - w), the last two from the imagined pictures: 0
    # where 3.2 w^2 - 2.2 w - 0.1 = 0.
    expected = (2.2 + math.sqrt(6.12)) / 6.4
    assert fit_weights(p, torch.tensor([0, 1]))[0] == pytest.approx(expected, abs=1e-4)
    # One teacher explains both pictures alone: 2 and 1 imagined of 4.
    sure = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert fit_weights(sure, torch.tensor([0, 1]))[0] == pytest.approx(3 / 4)
