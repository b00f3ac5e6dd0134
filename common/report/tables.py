"""Tables: the numbers of metrics.json for the terminal, a row per picture for spreadsheets."""

import csv

from common.files import atomic_path
from common.metrics import describe_rates, target_verdict
from infer import csv_name

SCORES = {  # printed beside the accuracy
    "balanced_accuracy": "balanced", "macro_f1": "F1", "nll": "NLL", "ece": "ECE", "auroc": "AUROC",
}


def print_tables(summary):
    """Print the content of metrics.json: a block per model, then what its threshold does."""
    models, baseline = summary["models"], summary["baseline"]
    head = ["", "accuracy", *SCORES.values(), "minus baseline" if baseline else ""]
    rows = [head + ["M params", "    MB", "    ms"]]
    for name, model in models.items():
        mean = f"{model['mean_accuracy']:.4f} mean over sets"
        cost = [f"{model['parameters'] / 1e6:8.2f}", f"{model['bytes'] / 1e6:6.1f}"]
        cost.append(f"{model['latency_ms']:6.1f} {model['latency_device']}")
        rows.append([name, mean, *[""] * len(SCORES), minus(model, name == baseline), *cost])
        for of, s in model["sets"].items():
            accuracy = "{:.4f} [{:.4f}, {:.4f}]".format(s["accuracy"], *s["accuracy_interval"])
            others = [f"{s[key]:.4f}" if key in s else "" for key in SCORES]
            rows.append([f"  {of}", accuracy, *others, minus(s, name == baseline), "", "", ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    sets = next(iter(models.values()))["sets"]
    sizes = ", ".join(f"{of} {s['n']}" for of, s in sets.items())
    compared = f", Agresti and Min's of differences to {baseline}; wins:losses" if baseline else ""
    print(f"\ntest pictures: {sizes}; [95 % intervals], Wilson's of accuracies{compared}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print()
    for point in operating_points(models):
        rejecting = "{file} on {set}, rejecting from {threshold:.4f}".format_map(point)
        print(f"{rejecting}: {point['rates']}; target {point['verdict']}")
    for each in summary["untold"]:
        print(
            "validation does not tell about {set}: {differ} of {models} models differ by more than "
            "both intervals, {model} most ({val:.4f} on val, {test:.4f} there)".format_map(each)
        )


def minus(scores, is_baseline):
    """The difference to the baseline as a cell: accuracy, interval, wins:losses."""
    if is_baseline or "minus_baseline" not in scores:
        return "the baseline" if is_baseline else ""
    d = scores["minus_baseline"]
    interval = "[{:+.4f}, {:+.4f}]".format(*d["interval"])
    return f"{d['difference']:+.4f} {interval} {d['wins']}:{d['losses']}"


def operating_points(models):
    """A row per exported file and test set: what its threshold does there, and the verdict."""
    return [
        {"file": name, "set": of, "verdict": target_verdict(point), **point,
         "rates": describe_rates(point, by_part=model["group_regex"])}
        for name, model in models.items()
        for of, scores in model["sets"].items()
        if (point := scores.get("operating_point"))
    ]


def write_predictions(answers, pictures, classes, path):
    """A row per model, test set and picture: path, label, prediction, probability of each class.

    answers: {(model, set): float [N, K]}; pictures: {set: Pictures}.
    """
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # of odd file names
    with atomic_path(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        head = ["model", "set", "path", "label", "prediction"]
        writer.writerow(head + [f"p_{name}" for name in classes])
        for (model, of), probabilities in answers.items():
            labels = pictures[of].labels.tolist()
            for where, label, row in zip(pictures[of].paths(), labels, probabilities):
                words = [model, of, where, classes[label], classes[row.argmax()]]
                writer.writerow([*map(csv_name, words), *(f"{p:.6f}" for p in row)])
