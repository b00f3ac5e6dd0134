"""What evaluate.py found as tables: for the terminal, and a row per picture for spreadsheets.

results: {model: {"kind", "sets": {set: metrics.score and more}, "mean_accuracy", "parameters",
"bytes", "latency_ms", "latency_device", ...}}.
"""

import csv

from common.files import atomic_path
from common.threshold import describe_rates

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the start of a formula


def print_table(results, set_names, baseline):
    """Print a block per model: the mean over test sets, then each test set."""
    names = [*results, *(f"  {name}" for name in set_names)]
    width = max(len(name) for name in names)
    first = next(iter(results.values()))["sets"]
    sizes = ", ".join(f"{name} {first[name]['n']}" for name in set_names)
    compared = f"; differences are to {baseline}" if baseline else ""
    print(f"\ntest pictures: {sizes}; [95 % bootstrap intervals]{compared}")
    difference = f"{'minus baseline':26}" if baseline else ""
    print(
        f"{'':{width}}  accuracy                 balanced     F1    NLL    ECE  {difference}"
        "  M params     MB     ms"
    )
    for name, result in results.items():
        cost = (
            f"{result['parameters'] / 1e6:8.2f} {result['bytes'] / 1e6:8.1f} "
            f"{result['latency_ms']:6.1f} {result['latency_device']}"
        )
        mean = f"{result['mean_accuracy']:.4f}  mean over sets {'':33}"
        print(f"{name:{width}}  {mean}{signed(result, name, baseline)}{cost}")
        for set_name in set_names:
            s = result["sets"][set_name]
            low, high = s["accuracy_interval"]
            print(
                f"{'  ' + set_name:{width}}  {s['accuracy']:.4f} [{low:.4f}, {high:.4f}]  "
                f"{s['balanced_accuracy']:.4f} {s['macro_f1']:.4f} {s['nll']:6.3f} "
                f"{s['ece']:6.3f}  {signed(s, name, baseline)}"
            )
    print()


def print_operating_points(results):
    """Miss and false-alarm rates of the exported files at the thresholds they carry."""
    for name, result in results.items():
        for set_name, s in result["sets"].items():
            if "operating_point" in s:
                point = s["operating_point"]
                rejecting = f"rejecting from {point['threshold']:.4f}"
                print(f"{name} on {set_name}, {rejecting}: {describe_rates(point)}")


def signed(result, name, baseline):
    """The difference to the baseline with its interval, as a column of the table."""
    if not baseline:
        return ""
    if name == baseline:
        return f"{'the baseline':26}"
    d = result["minus_baseline"]
    low, high = d["interval"]
    return f"{d['difference']:+.4f} [{low:+.4f}, {high:+.4f}] "


def write_predictions(answers, pictures, classes, path):
    """A row per model, test set and picture: path, label, prediction, probability of each class.

    answers: {(model, set): float [N, K]}; pictures: {set: Pictures}.
    """
    head = ["model", "set", "path", "label", "prediction", *(f"p_{name}" for name in classes)]
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # of odd file names
    with atomic_path(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        writer.writerow([cell(word) for word in head])
        for (model, set_name), probabilities in answers.items():
            labels = pictures[set_name].labels.tolist()
            paths = pictures[set_name].paths()
            for path, label, row in zip(paths, labels, probabilities.tolist()):
                prediction = classes[row.index(max(row))]
                words = [model, set_name, path, classes[label], prediction]
                writer.writerow([cell(word) for word in words] + [f"{p:.6f}" for p in row])


def cell(word):
    """A word as a spreadsheet should show it: never as a formula."""
    return f"'{word}" if word.startswith(FORMULA) else word
