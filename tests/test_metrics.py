"""Metrics against numbers worked out by hand, promises against many draws."""

import math

import numpy as np
import pytest

from common.metrics import (
    auroc,
    choose_threshold,
    defect_scores,
    difference,
    ece,
    largest_count,
    of_parts,
    pictures_needed,
    promised_rate,
    rates,
    reliability,
    score,
    sign_test,
    target_verdict,
    verdict,
    wilson,
)

SCORES = np.array([0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.1, 0.05])
DEFECTIVE = np.array([True, True, True, True, False, False, False, False])


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
    s = score(one_hot(np.array([0, 1])), np.array([0, 1]))
    assert s["balanced_accuracy"] == 1 and s["recall"] == [1, 1, None]


def test_ece_weighs_bins_by_their_share():
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    # Bin of 0.9: two of three right, gap 0.9 - 2/3; bin of 0.6: right, gap 0.4.
    expected = 3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.4
    assert ece(probabilities, np.array([0, 0, 1, 0])) == pytest.approx(expected)


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    # Of the 16 pairs of a defect and a good part, 0.3 is below 0.6.
    assert auroc(SCORES, DEFECTIVE) == 15 / 16
    assert auroc(1 - SCORES, DEFECTIVE) == 1 / 16
    assert auroc(np.zeros(8), DEFECTIVE) == 1 / 2  # all pairs are equal


def test_the_interval_of_a_difference_by_hand():
    a, b = np.ones(98, bool), np.ones(98, bool)
    a[:4], b[4:13] = False, False  # 9 wins, 4 losses of 98
    half = 1.959964 * math.sqrt((14 / 100 - 0.05**2) / 100)
    assert difference([a], [b])["interval"] == pytest.approx([0.05 - half, 0.05 + half])


def test_the_interval_of_a_difference_is_about_that_of_resampled_pictures():
    rng = np.random.default_rng(1)
    a, b = rng.random(300) < 0.9, rng.random(300) < 0.8
    picks = rng.integers(0, 300, (10_000, 300))
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


def test_the_interval_over_small_sets_holds_the_difference_and_is_a_share():
    right, wrong = np.ones(12, bool), np.zeros(12, bool)
    one, five = difference([right], [wrong]), difference([right] * 5, [wrong] * 5)
    assert one["interval"][1] == five["interval"][1] == 1.0
    assert one["interval"][0] < five["interval"][0] < 1


def test_a_model_against_itself_differs_by_nothing():
    a = np.random.default_rng(1).random(50) < 0.5
    nothing = difference([a], [a])
    assert nothing["difference"] == 0 and nothing["p"] == 1
    assert nothing["interval"] == pytest.approx([-1.959964 / 52, 1.959964 / 52])  # not [0, 0]
    assert verdict(nothing) == "not told apart from"


def test_better_than_needs_the_exact_sign_test():
    assert sign_test(4, 0) == pytest.approx(2 / 2**4)
    assert sign_test(2, 5) == pytest.approx(2 * (1 + 7 + 21) / 2**7)
    right, wrong = np.ones(100, bool), np.ones(100, bool)
    wrong[:4] = False  # chance does it in 12.5 %
    four = difference([right], [wrong])
    assert (four["wins"], four["losses"]) == (4, 0)
    assert verdict(four) == "not told apart from"
    wrong[:6] = False
    assert verdict(difference([right], [wrong])) == "better than"
    assert verdict(difference([wrong], [right])) == "worse than"


def test_of_sets_of_unequal_size_the_interval_of_their_mean_decides_too():
    # 40 wins to 10 losses over 1000 pictures, and 1 to 1 over 40: +1.5 points, p < 0.001.
    a, b = [np.ones(1000, bool), np.ones(40, bool)], [np.ones(1000, bool), np.ones(40, bool)]
    b[0][:40], a[0][40:50], b[1][0], a[1][1] = False, False, False, False
    both = difference(a, b)
    assert both["p"] < 0.001 and both["difference"] == pytest.approx(0.015)
    assert both["interval"][0] < 0 and verdict(both) == "not told apart from"


def test_intervals_count_parts_where_several_pictures_show_one():
    right = np.repeat([True, False, True, False], 5)
    names = np.repeat(list("abcd"), 5)
    alone = score(one_hot(np.where(right, 0, 1)), np.zeros(20, int))
    grouped = score(one_hot(np.where(right, 0, 1)), np.zeros(20, int), parts=names)
    assert (alone["trials"], grouped["trials"]) == (20, pytest.approx(4))  # five say what one says
    assert grouped["accuracy_interval"] == pytest.approx(list(wilson(2, 4)))
    mixed = score(one_hot(np.where(right, 0, 1)), np.zeros(20, int), parts=np.tile(names[::5], 5))
    assert mixed["trials"] == 20  # what parts have in common says nothing here

    better = difference([np.ones(20, bool)], [right], [names])
    assert (better["difference"], better["wins"], better["losses"]) == (0.5, 2, 0)
    four = difference([np.ones(4, bool)], [right[::5]])
    assert better["interval"] == pytest.approx(four["interval"])
    assert verdict(difference([np.ones(20, bool)], [right])) == "better than"
    assert verdict(better) == "not told apart from"  # chance does it once in two
    singles = difference([np.ones(20, bool)], [right], [np.arange(20)])
    assert singles == difference([np.ones(20, bool)], [right])


def test_pictures_of_one_part_promise_no_more_than_one():
    scores, defective = np.array([0.9, 0.2, 0.8, 0.1, 0.3]), np.array([1, 1, 1, 0, 0], bool)
    scores, defective = of_parts(scores, defective, ["a", "a", "b", "c", "c"])
    assert scores.tolist() == [0.2, 0.8, 0.3] and defective.tolist() == [True, True, False]
    many, defective = np.linspace(0, 1, 70), np.arange(70) >= 10
    names = [f"{row // 5}" for row in range(70)]  # 12 defective parts of 5 pictures
    point = choose_threshold(*of_parts(many, defective, names), "miss", 0.05)
    assert point["pictures"] == 12 and point["promised"] == pytest.approx(1 - 0.05 ** (1 / 12))


def test_wilson_interval_by_hand():
    z = 1.959964
    assert wilson(0, 10) == pytest.approx((0.0, z**2 / (10 + z**2)), abs=1e-6)
    half = z * math.sqrt(2.5 + z**2 / 4) / (10 + z**2)
    assert wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half))
    everything = score(one_hot(np.zeros(720, int)), np.zeros(720, int))
    assert everything["accuracy_interval"] == pytest.approx([720 / (720 + z**2), 1.0])


def test_the_curve_of_reliability_holds_every_decision_and_no_empty_bin():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 500)
    labels = rng.integers(0, 3, 500)
    confidence, accuracy, share = reliability(probabilities, labels)
    assert share.sum() == pytest.approx(1)
    error = (share * np.abs(accuracy - confidence)).sum()
    assert error == pytest.approx(ece(probabilities, labels))
    assert len(confidence) == 10  # of 15 bins those above 1/3


# -------------------------------------------------------------------------------------- threshold


def test_defect_scores_are_the_sum_of_the_other_classes():
    tiny = np.array([[1 - 3e-9, 1e-9, 2e-9]], np.float32)
    assert defect_scores(tiny, 0)[0] == pytest.approx(3e-9)  # 1 - p(good) is 0 here
    assert defect_scores([[0.2, 0.5, 0.3]], 1)[0] == pytest.approx(0.5)


def test_the_bound_of_a_binomial_by_hand():
    # 0.95^58 = 0.0510, 0.95^59 = 0.0485
    assert largest_count(58, 0.05) == -1 and largest_count(59, 0.05) == 0
    assert pictures_needed(0.05) == 59 and pictures_needed(0.01) == 299
    # 0.9^46 + 46 * 0.1 * 0.9^45 = 0.0479; of 45 it is 0.0524
    assert largest_count(45, 0.1) == 0 and largest_count(46, 0.1) == 1
    assert largest_count(300, 0.05) == 8
    assert largest_count(5000, 0.01) == 38  # and no overflow
    assert promised_rate(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert promised_rate(10, 10) == 1.0


def many(n):
    """(scores, defective) of n good parts from 0 to 0.5 and n defects from 0.4 to 0.9."""
    return np.r_[np.linspace(0, 0.5, n), np.linspace(0.4, 0.9, n)], np.repeat([False, True], n)


def test_a_miss_rate_target_gives_the_middle_of_the_highest_gap_that_keeps_it():
    few = choose_threshold(SCORES, DEFECTIVE, "miss", 0.25)  # of four none may pass
    assert few["threshold"] == pytest.approx(0.25)  # the good part at 0.2, the defect at 0.3
    counts = few["validation"]
    assert counts["miss"]["count"] == 0 and counts["false_alarm"]["count"] == 1
    assert few["promised"] == pytest.approx(1 - 0.05**0.25) and few["needed"] == 11
    scores, defective = many(46)
    enough = choose_threshold(scores, defective, "miss", 0.1)  # one of 46 may pass
    assert enough["validation"]["miss"]["count"] == 1 and enough["promised"] <= 0.1
    gap = np.sort(scores)[[k := np.sort(scores).searchsorted(enough["threshold"]), k - 1]]
    assert enough["threshold"] == pytest.approx(gap.mean())


def test_a_false_alarm_target_gives_the_middle_of_the_lowest_gap_that_keeps_it():
    point = choose_threshold(SCORES, DEFECTIVE, "false_alarm", 0.25)  # none of four
    assert point["threshold"] == pytest.approx(0.65)  # the good part at 0.6, the defect at 0.7
    counts = point["validation"]
    assert counts["false_alarm"]["count"] == 0 and counts["miss"]["count"] == 1
    point = choose_threshold(*many(46), "false_alarm", 0.1)
    assert point["validation"]["false_alarm"]["count"] == 1


def test_tied_scores_never_break_the_target():
    scores, defective = np.repeat([0.5, 0.1], [46, 1]), np.repeat([True, False], [46, 1])
    point = choose_threshold(scores, defective, "miss", 0.1)
    assert point["validation"]["miss"]["count"] == 0


@pytest.mark.parametrize("n", [30, 108, 300])
def test_the_promised_miss_rate_is_broken_in_at_most_five_draws_of_a_hundred(n):
    """Scores of defects are uniform, so the true miss rate is the threshold itself."""
    rng = np.random.default_rng(n)
    broken = 0
    for _ in range(2000):
        scores, defective = rng.random(2 * n), np.repeat([True, False], n)
        scores[~defective] = 0.0  # so the threshold lies between two defects
        point = choose_threshold(scores, defective, "miss", 0.05)
        reject = scores[defective & (scores >= point["threshold"])].min()
        broken += reject > max(0.05, point["promised"])
    assert broken / 2000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


def test_a_target_on_a_test_set_is_judged_by_the_same_bound():
    def judged(missed, n, target):
        scores = np.r_[np.zeros(missed), np.ones(n - missed)]
        point = rates(scores, np.ones(n, bool), 0.5)
        return target_verdict({"goal": "miss", "target": target, **point})

    assert judged(0, 59, 0.05) == "met" and judged(0, 58, 0.05) == "not shown to be met"
    assert judged(8, 300, 0.05) == "met" and judged(9, 300, 0.05) == "not shown to be met"
    assert judged(30, 300, 0.05) == "missed"
    none = rates([0.4], np.array([True]), 0.5)["false_alarm"]
    assert none == {"rate": None, "count": 0, "n": 0, "interval": [0.0, 1.0]}
