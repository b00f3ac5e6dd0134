"""Line charts as plain data, for page.html.jinja to draw: curves of tests and of training."""

import csv
import math
from pathlib import Path

import numpy as np

from common import metrics
from common.files import first_line


def reliability(probabilities, labels):
    """The chart of how often decisions of some probability are right, in the bins of the ECE.

    probabilities: float [N, K]; labels: int [N].
    """
    confidence, accuracy, _ = metrics.reliability(probabilities, labels)
    lines = {"measured": list(zip(confidence, accuracy)), "calibrated": [(0, 0), (1, 1)]}
    return chart("Reliability", ("probability of the decision", "share of right ones"), lines)


def operating_curve(scores, defective, point):
    """The chart of misses against false alarms at all thresholds, the stored one marked.

    scores: float [N], the defect scores; defective: bool [N]; point: `metrics.rates`, goal, target.
    """
    thresholds = np.quantile(scores, np.linspace(0, 1, 200))
    rejected = scores >= thresholds[:, None]
    curve = list(zip(rejected[:, ~defective].mean(1), 1 - rejected[:, defective].mean(1)))
    most = point["target"]
    limit = [(0, most), (1, most)] if point["goal"] == "miss" else [(most, 0), (most, 1)]
    lines = {"all thresholds": curve, "target": limit}
    names = "share of good parts rejected", "share of defects missed"
    mark = point["false_alarm"]["rate"], point["miss"]["rate"]
    return chart("Operating curve; the dot is the file's threshold", names, lines, mark=mark)


def training_charts(checkpoints):
    """The charts of what log.csv says beside each checkpoint; [] without one."""
    logs = {}
    for name in checkpoints:
        path = Path(name).with_name("log.csv")
        try:
            if path.is_file():
                logs[name] = read_log(path)
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            print(f"{path}: left out of the report, damaged ({first_line(error)})")
    if not logs:
        return []
    steps, _, loss = np.concatenate(list(logs.values())).max(0)
    accuracies, losses = ({name: log[:, [0, k]] for name, log in logs.items()} for k in (1, 2))
    return [
        chart("Validation", ("steps", "balanced accuracy"), accuracies, (steps, 1)),
        chart("Training loss, each of its own kind", ("steps", "loss"), losses, (steps, loss)),
    ]


def read_log(path):
    """Steps, balanced accuracy and loss: float64 [rows, 3]. Raises many kinds for a damaged log."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    names = ("steps", "val_balanced_accuracy", "loss")
    log = np.array([[float(row[name]) for name in names] for row in rows])
    if not (rows and np.isfinite(log).all()):
        raise ValueError("no row, or a number that is not finite")
    return log


def chart(title, names, lines, highest=(1, 1), mark=None):
    """A line chart, its axes from 0 to `highest` with round numbers on them.

    names: of the axes; lines: {name: [(x, y)]}; mark: (x, y) of a dot.
    """
    content = {"title": title, "names": names, "lines": lines, "mark": mark}
    highest = [float(value) or 1.0 for value in highest]
    return {**content, "highest": highest, "ticks": [ticks(value) for value in highest]}


def ticks(highest):
    """About five round numbers from 0 to `highest`."""
    rough = highest / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor > 0.999 * rough)
    return [k * step for k in range(int(1.001 * highest / step) + 1)]
