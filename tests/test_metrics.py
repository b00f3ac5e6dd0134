"""Metrics against numbers worked out by hand, the shortcut bootstrap against the long one."""

import numpy as np
import pytest

from common.metrics import (
    accuracy_interval,
    balanced_number,
    confusion_matrix,
    difference,
    ece,
    good_enough,
    score,
)


def one_hot(predicted, classes=3):
    return np.eye(classes)[predicted] * 0.7 + 0.1


def test_scores_of_a_small_case():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    s = score(one_hot(predicted), labels)
    assert s["confusion_matrix"] == [[3, 1, 0], [0, 1, 1], [0, 0, 2]]  # rows are true classes
    assert s["accuracy"] == 6 / 8 and s["n"] == 8
    assert s["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert s["macro_f1"] == pytest.approx((6 / 7 + 2 / 4 + 4 / 5) / 3)
    assert s["nll"] == pytest.approx(-(6 * np.log(0.8) + 2 * np.log(0.1)) / 8)
    assert s["ece"] == pytest.approx(0.05)  # always 0.8 sure, 0.75 right


def test_a_class_without_test_pictures_does_not_count_in_balanced_accuracy():
    assert score(one_hot(np.array([0, 1])), np.array([0, 1]))["balanced_accuracy"] == 1


def test_ece_weighs_bins_by_their_share():
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    # Bin of 0.9: two of three right, gap 0.9 - 2/3; bin of 0.6: right, gap 0.4.
    expected = 3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.4
    assert ece(probabilities, np.array([0, 0, 1, 0])) == pytest.approx(expected)


def test_confusion_matrix_counts_rows_as_true():
    matrix = confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_bootstrap_intervals_equal_those_of_resampled_pictures():
    rng = np.random.default_rng(1)
    a, b = rng.random(300) < 0.9, rng.random(300) < 0.8
    picks = rng.integers(0, 300, (10_000, 300))
    low, high = np.percentile(a[picks].mean(1), [2.5, 97.5])
    assert accuracy_interval(a.sum(), 300) == pytest.approx((low, high), abs=0.004)
    low, high = np.percentile(a[picks].mean(1) - b[picks].mean(1), [2.5, 97.5])
    d = difference([a], [b])
    assert d["difference"] == pytest.approx(a.mean() - b.mean())
    assert d["interval"] == pytest.approx([low, high], abs=0.006)


def test_difference_over_two_sets_is_the_mean_and_narrower():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.9, rng.random(400) < 0.8
    one, two = difference([a], [b]), difference([a, a], [b, b])
    assert two["difference"] == pytest.approx(one["difference"])
    widths = [np.diff(d["interval"])[0] for d in (one, two)]
    assert widths[1] == pytest.approx(widths[0] / np.sqrt(2), rel=0.1)


def test_a_model_against_itself_differs_by_nothing():
    a = np.random.default_rng(1).random(50) < 0.5
    assert difference([a], [a]) == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_the_latest_checkpoint_within_one_standard_error_of_the_best_is_chosen():
    history = [0.90, 29 / 30, 28 / 30, 27 / 30]
    chosen = [good_enough(history[:end], 30) for end in range(1, 5)]
    # p = 31/34, one standard error 0.0486, 29/30 - 0.0486 = 0.918
    assert chosen == [True, True, True, False]
    assert good_enough([1, 29 / 30], 30)  # 1 - 0.0404
    assert not good_enough([1, 29 / 30], 300)  # 1 - 0.0046
    labels = np.repeat([0, 1], [90, 10])
    assert balanced_number(labels) == pytest.approx(36)  # 4 / (1 / 90 + 1 / 10)
