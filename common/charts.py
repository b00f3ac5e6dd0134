"""Line charts as plain data, in px, for report.html.jinja to draw: curves of tests and training."""

import csv
import math
from pathlib import Path

import numpy as np

from common.errors import first_line

BINS = 10  # of the reliability curve
BOX = {"width": 360, "height": 240, "left": 50, "right": 346, "top": 12, "bottom": 196}  # px
RATES = {"max_miss_rate": "miss", "max_false_alarm_rate": "false_alarm"}  # that targets are about


def reliability(probabilities, labels):
    """The chart of how often decisions of some probability are right."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    members = [bin_of == k for k in np.unique(bin_of)]
    found = [(confidence[rows].mean(), right[rows].mean()) for rows in members]
    lines = {"found": found, "calibrated": [(0, 0), (1, 1)]}
    return chart("Reliability", ("probability of the decision", "share of right ones"), lines)


def operating_curve(scores, defective, point):
    """The chart of misses against false alarms at all thresholds, the stored one marked.

    scores: float [N], 1 - p(good); defective: bool [N].
    """
    found = []
    for threshold in np.quantile(scores, np.linspace(0, 1, 200)):
        rejected = scores >= threshold
        found.append((rejected[~defective].mean(), 1 - rejected[defective].mean()))
    ((goal, target),) = point["target"].items()
    limit = [(0, target), (1, target)] if RATES[goal] == "miss" else [(target, 0), (target, 1)]
    lines = {"all thresholds": found, "target": limit}
    names = "share of good parts rejected", "share of defects missed"
    mark = point["false_alarm"]["rate"], point["miss"]["rate"]
    return chart("Operating curve; the dot is the file's threshold", names, lines, mark=mark)


def training_charts(checkpoints):
    """The charts of what log.csv says beside each checkpoint; [] without one."""
    accuracy, loss = {}, {}
    for name in checkpoints:
        log = Path(name).with_name("log.csv")
        if log.is_file():
            try:
                accuracy[name], loss[name] = read_log(log)
            except (ValueError, TypeError, KeyError, csv.Error) as error:
                print(f"{log}: left out of the report, damaged ({first_line(error)})")
    if not loss:
        return []
    last, highest = np.max(np.concatenate(list(loss.values())), axis=0)
    return [
        chart("Validation", ("steps", "balanced accuracy"), accuracy, (last, 1)),
        chart("Training loss, each of its own kind", ("steps", "loss"), loss, (last, highest)),
    ]


def read_log(path):
    """(accuracies, losses) of a training curve: [(steps, value)] each. Raises for a damaged one."""
    accuracy, loss = [], []
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        values = [float(row[key]) for key in ("steps", "val_balanced_accuracy", "loss")]
        if not np.isfinite(values).all():
            raise ValueError("not a finite number")
        accuracy.append((values[0], values[1]))
        loss.append((values[0], values[2]))
    if not loss:
        raise ValueError("no row")
    return accuracy, loss


def chart(title, names, lines, highest=(1, 1), mark=None):
    """A line chart as the template draws it: everything in px of BOX.

    names: of the axes, from 0 to `highest`; lines: {name: [(x, y)]}; mark: (x, y) of a dot.
    """
    x_highest, y_highest = (float(value) or 1.0 for value in highest)

    def at(point):
        x = BOX["left"] + point[0] / x_highest * (BOX["right"] - BOX["left"])
        y = BOX["bottom"] - point[1] / y_highest * (BOX["bottom"] - BOX["top"])
        return f"{x:.1f}", f"{y:.1f}"

    return {
        "title": title,
        "names": names,
        "box": BOX,
        "x_ticks": [(f"{value:g}", at((value, 0))[0]) for value in ticks(x_highest)],
        "y_ticks": [(f"{value:g}", at((0, value))[1]) for value in ticks(y_highest)],
        "lines": {name: " ".join(map(",".join, map(at, line))) for name, line in lines.items()},
        "mark": at(mark) if mark else None,
    }


def ticks(highest):
    """About five round numbers from 0 to `highest`."""
    rough = highest / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor > 0.999 * rough)
    return [k * step for k in range(int(1.001 * highest / step) + 1)]
