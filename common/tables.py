"""What `evaluate.py` found as tables: for the terminal, for spreadsheets, and confusion matrices to read.

results: {model: {"kind", "sets": {set: metrics.score and more}, "mean_accuracy", "parameters", "bytes", "latency_ms", ...}}.
"""

import csv

from common.checkpoints import atomic_path
from common.operating_point import describe_rates


def print_table(results, set_names, baseline):
    width = max(len(name) for name in [*results, *(f"  {s}" for s in set_names)])
    sizes = ", ".join(f"{s} {next(iter(results.values()))['sets'][s]['n']}" for s in set_names)
    print(f"\ntest pictures: {sizes}; [95 % bootstrap intervals]" + (f"; differences are to {baseline}" if baseline else ""))
    print(f"{'':{width}}  accuracy                 balanced     F1    NLL    ECE  "
          + (f"{'minus baseline':26}" if baseline else "") + "  M params     MB     ms")
    for name, result in results.items():
        print(f"{name:{width}}  {result['mean_accuracy']:.4f}  mean over sets {'':33}{signed(result, name, baseline)}"
              f"{result['parameters'] / 1e6:8.2f} {result['bytes'] / 1e6:8.1f} {result['latency_ms']:6.1f}")
        for set_name in set_names:
            s = result["sets"][set_name]
            low, high = s["accuracy_interval"]
            print(f"{'  ' + set_name:{width}}  {s['accuracy']:.4f} [{low:.4f}, {high:.4f}]  {s['balanced_accuracy']:.4f} "
                  f"{s['macro_f1']:.4f} {s['nll']:6.3f} {s['ece']:6.3f}  {signed(s, name, baseline)}")
    print()


def print_operating_points(results):
    """Miss and false-alarm rates of the exported files at the thresholds they carry."""
    for name, result in results.items():
        for set_name, s in result["sets"].items():
            if point := s.get("operating_point"):
                print(f"{name} on {set_name}, rejecting from {point['threshold']:.4f}: {describe_rates(point)}")


def signed(result, name, baseline):
    if not baseline:
        return ""
    if name == baseline:
        return f"{'the baseline':26}"
    d = result["minus_baseline"]
    return f"{d['difference']:+.4f} [{d['interval'][0]:+.4f}, {d['interval'][1]:+.4f}] "


def write_confusions(results, classes, path):
    """Confusion matrices as text, rows true and columns predicted classes."""
    width = max(map(len, classes))
    lines = []
    for name, result in results.items():
        for set_name, s in result["sets"].items():
            lines.append(f"{name} on {set_name}: rows are true, columns predicted classes")
            lines.append(" " * width + "".join(f"  {c:>{max(5, len(c))}}" for c in classes))
            for c, row in zip(classes, s["confusion_matrix"]):
                lines.append(f"{c:{width}}" + "".join(f"  {count:{max(5, len(k))}d}" for k, count in zip(classes, row)))
            lines.append("")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def write_csv(results, path):
    """A row per model and test set. A leading = + - @ would be run as a formula by spreadsheets, so a quote goes before it."""
    def cell(value):
        return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value

    keys = ("n", "accuracy", "balanced_accuracy", "macro_f1", "nll", "ece")
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "set", *keys, "low", "high", "minus_baseline"))
        for name, result in results.items():
            for set_name, s in result["sets"].items():
                writer.writerow([cell(name), cell(set_name), *(s[key] for key in keys), *s["accuracy_interval"],
                                 s.get("minus_baseline", {}).get("difference", "")])
