"""Does a threshold chosen on validation keep its promise? Share of draws in which it does not.

    python tests/benchmarks/threshold.py    # seconds

Scores of defects are drawn uniformly, so that the true miss rate of a threshold is the threshold
itself; nothing depends on how they are distributed. `empirical` is the threshold at which the share
of the validation pictures is at the target, as earlier versions chose it; `bound` is
`common.metrics.choose_threshold`. Where pictures are too few for the target, the promise of the
bound is the rate that it prints, in brackets.
"""

import numpy as np
from bench import print_table  # puts the repository on the path

from common.metrics import largest_count, promised_rate

DRAWS = 20_000
PICTURES = (30, 60, 100, 300, 1000)
TARGETS = (0.05, 0.01)


def true_rates(n, allowed, rng):
    """The true miss rates of DRAWS thresholds that let `allowed` of n defects pass: float [DRAWS].

    The threshold lies in the middle between two scores, as `choose_threshold` puts it.
    """
    scores = np.sort(rng.random((DRAWS, n)), axis=1)
    below = scores[:, allowed - 1] if allowed else 0.0
    return (below + scores[:, allowed]) / 2


def main():
    rng = np.random.default_rng(0)
    rows = []
    for target in TARGETS:
        for n in PICTURES:
            empirical = true_rates(n, int(target * n), rng)
            allowed = max(0, largest_count(n, target))
            promised = max(target, promised_rate(allowed, n))
            bound = true_rates(n, allowed, rng)
            note = f" ({100 * promised:.1f} %)" if promised > target else ""
            rows.append([
                f"{100 * target:g}",
                str(n),
                f"{100 * empirical.mean():.1f}",
                f"{100 * (empirical > target).mean():.1f}",
                f"{100 * bound.mean():.1f}",
                f"{100 * (bound > promised).mean():.1f}{note}",
            ])
    print_table([
        "target, %", "validation defects", "empirical: mean true rate, %",
        "draws above the target, %", "bound: mean true rate, %", "draws above its promise, %",
    ], rows)


if __name__ == "__main__":
    main()
