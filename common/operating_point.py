"""From class probabilities to pass or reject: the threshold, what it rests on, and what it costs.

The defect score of a picture is 1 - p(good). A part is rejected when its score reaches the threshold. A *miss* is a defect
that passes, a *false alarm* a good part that is rejected.
"""

import math

import numpy as np

GOOD_NAMES = ("good", "ok")
Z = 1.959964  # two-sided 95 % of the normal distribution


def good_class(classes, wanted=None):
    """The class that is no defect: `wanted`, or the one called good or ok, or None where there is none."""
    return wanted or next((name for name in classes if name.lower() in GOOD_NAMES), None)


def wilson(k, n):
    """95 % interval of a share k / n   (Wilson 1927): (low, high), or (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, spread = k / n, Z**2 / n
    middle, half = share + spread / 2, Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def pictures_needed(target):
    """How many pictures, none of them wrong, show a rate to be at most `target` with 95 % confidence.

    (1 - target)^n <= 0.05; about 3 / target.
    """
    return math.ceil(math.log(0.05) / math.log(1 - target))


def rates(scores, defective, threshold):
    """Miss rate and false-alarm rate at a threshold, as plain data with counts and Wilson intervals.

    scores: float [N] in [0, 1]; defective: bool [N].
    """
    rejected = np.asarray(scores) >= threshold
    result = {}
    for name, wrong, of in (("miss", ~rejected, defective), ("false_alarm", rejected, ~defective)):
        k, n = int((wrong & of).sum()), int(of.sum())
        result[name] = {"rate": k / n if n else None, "count": k, "n": n, "interval": list(wilson(k, n))}
    return result


def choose_threshold(scores, defective, max_miss_rate=None, max_false_alarm_rate=None):
    """The threshold that meets one target on validation pictures and is kindest to the other rate.

    scores: float [N] in [0, 1]; defective: bool [N], both kinds present; exactly one target, in (0, 1). For a miss rate that is
    the highest threshold at which at most that share of the defects scores below it; for a false-alarm rate the lowest at
    which at most that share of the good parts reaches it; each moved to the middle of the gap between two
    pictures' scores, which changes no decision here and leaves room for rounding on another device. Returns plain data:
    threshold, target, the rates it has on these pictures, pictures and needed (see
    `pictures_needed`) for the kind of picture the target is about.
    """
    scores, defective = np.asarray(scores, np.float64), np.asarray(defective, bool)
    if (max_miss_rate is None) == (max_false_alarm_rate is None):
        raise ValueError("give one of max_miss_rate and max_false_alarm_rate")
    if max_miss_rate is not None:
        name, target, rising = "max_miss_rate", max_miss_rate, np.sort(scores[defective])
        reject, pictures = rising[int(max_miss_rate * len(rising))], len(rising)  # the mildest score to be rejected
        let_pass = scores[scores < reject].max(initial=0.0)
    else:
        name, target, falling = "max_false_alarm_rate", max_false_alarm_rate, np.sort(scores[~defective])[::-1]
        let_pass, pictures = falling[int(max_false_alarm_rate * len(falling))], len(falling)  # the worst score to pass
        reject = scores[scores > let_pass].min(initial=1.0 + 1e-6)  # above 1 where even a score of 1 is to pass
    threshold = (let_pass + reject) / 2
    return {"threshold": float(threshold), "target": {name: target}, "validation": rates(scores, defective, threshold),
            "pictures": pictures, "needed": pictures_needed(target)}


def describe_rates(point):
    """What `rates` found, in words."""
    def rate(name, title):
        r = point[name]
        if not r["n"]:
            return f"none there to be {title}"
        low, high = r["interval"]
        return f"{r['count']} of {r['n']} {title} ({100 * r['rate']:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f})"

    return f"{rate('miss', 'defects missed')}, {rate('false_alarm', 'good parts rejected')}"


def describe(point, good):
    """A few lines about `choose_threshold`'s result for people; a warning where too few pictures support it."""
    (name, target), = point["target"].items()
    lines = [f"threshold {point['threshold']:.4f} on 1 - p({good}), for {name.replace('_', ' ')} {100 * target:g} %; on validation "
             f"{describe_rates(point['validation'])}"]
    if point["pictures"] < point["needed"]:
        lines.append(f"warning: {point['pictures']} validation pictures cannot support {100 * target:g} %; {point['needed']} would be needed, "
                     "even with none of them wrong")
    return "\n".join(lines)
