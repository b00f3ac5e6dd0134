"""report.html: what `evaluate.py` found, as one page that opens from disk, prints, and needs no network.

Each section is a function from the findings (plain data, see `write`) to HTML. All names go through `escape`.
"""

import base64
import io
import json
from html import escape

import numpy as np
from PIL import Image

from common.checkpoints import atomic_path
from common.operating_point import describe_rates, wilson

WORST = 12  # mistakes shown per set
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")  # Okabe and Ito: safe for colour-blind readers
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #f2f2f2; --line: #c8c8c8; --good: #00664b; --bad: #a33c00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181a; --soft: #24282b; --line: #4a4f54; --good: #4cc9a0; --bad: #ff9a5c } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem } h3 { font-size: 1.05rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } caption { text-align: left; font-size: .85rem; padding: .5rem 0 .2rem } th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { background: var(--soft) } .scroll { overflow-x: auto } .scroll:focus { outline: 2px solid #0072b2 }
.answer { background: var(--soft); padding: .5rem 1rem; border-left: .4rem solid #0072b2 } .good { color: var(--good) } .bad { color: var(--bad) }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; max-width: 100% } figcaption { font-size: .85rem; max-width: 24rem; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font: 11px system-ui, sans-serif } .axis { stroke: var(--ink) } .grid { stroke: var(--line) }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem } .pictures figure { margin: 0; width: 9rem } .pictures img { width: 100%; image-rendering: auto; display: block }
nav a { margin-right: 1rem } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem } a { color: inherit }
@media print { body { max-width: none; font-size: 11px } nav { display: none } h2, h3 { break-after: avoid } figure, tr { break-inside: avoid }
  .scroll { overflow: visible } table { font-size: 9px } th, td { white-space: normal; padding: .1rem .3rem } td:first-child { overflow-wrap: anywhere } svg { width: 16rem } pre { font-size: 8px } }
"""


def write(findings, path):
    """Write the page. findings: the content of metrics.json and, beside it,

    `answers` {(model, set): probabilities float [N, K]}, `pictures` {set: Pictures}, `curves` {run: rows of its log.csv},
    `heatmaps` {set: {row: uint8 [H, W, 3]}} of the shown model's mistakes, `shown`: the model the sections per set are about.
    """
    sections = (("answer", "The answer", answer), ("models", "Models", models), ("sets", "Test sets", test_sets),
                ("curves", "Training", curves), ("audit", "Can the pictures be trusted?", audit), ("provenance", "Provenance", provenance))
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{make(findings)}</section>' for key, title, make in sections)
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>Inspection report</title><style>{STYLE}</style></head>'
            f"<body><h1>Inspection report</h1><nav>{links}</nav>{body}</body></html>\n")
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# ------------------------------------------------------------------------------------------ small pieces


def percent(value, digits=1):
    return f"{100 * value:.{digits}f}"


def span(interval):
    return f"{percent(interval[0])} to {percent(interval[1])}"


def table(head, rows, caption):
    """A table that scrolls by itself on a narrow screen; cells are HTML."""
    cells = "".join(f"<th scope=col>{h}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
            f"<thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>")


def picture(pixels, alt):
    """An <img> with the JPEG inside."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def plot(series, x_label, y_label, x_range=(0, 1), y_range=(0, 1), points=(), caption="", size=(360, 240)):
    """Lines {name: (x, y)} and points [(x, y, text)] in an SVG with labelled axes."""
    width, height = size
    left, bottom, right, top = 52, 40, 12, 10

    def at(x, y):
        u = left + (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1) * (width - left - right)
        v = height - bottom - (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1) * (height - top - bottom)
        return f"{u:.1f}", f"{v:.1f}"

    parts = []
    for tick in np.linspace(0, 1, 5):
        x, y = (low + tick * (high - low) for low, high in (x_range, y_range))
        (x0, v), (u, _) = at(x_range[0], y), at(x, y_range[0])
        parts.append(f'<line class="grid" x1="{x0}" x2="{width - right}" y1="{v}" y2="{v}"/><text x="{left - 6}" y="{v}" dy="4" text-anchor="end">{y:.3g}</text>'
                     f'<text x="{u}" y="{height - bottom + 16}" text-anchor="middle">{x:.3g}</text>')
    for k, (name, (xs, ys)) in enumerate(series.items()):
        coordinates = " ".join(",".join(at(x, y)) for x, y in zip(xs, ys))
        dash = ' stroke-dasharray="6 3"' if k % 2 else ""
        parts.append(f'<polyline fill="none" stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="2"{dash} points="{coordinates}"><title>{escape(name)}</title></polyline>')
    for x, y, text in points:
        u, v = at(x, y)
        parts.append(f'<circle cx="{u}" cy="{v}" r="5" fill="#d55e00"/><text x="{u}" y="{v}" dx="8" dy="-6">{escape(text)}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
                 f'<text transform="translate(13 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    legend = "" if len(series) < 2 else "".join(
        f'<br><span style="color:{COLOURS[k % len(COLOURS)]}" aria-hidden="true">{"╌" if k % 2 else "━"}</span> {escape(name)}' for k, name in enumerate(series))
    return (f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(caption)}">{"".join(parts)}</svg>'
            f"<figcaption>{escape(caption)} {legend}</figcaption></figure>")


# ---------------------------------------------------------------------------------------------- sections


def answer(f):
    """Does the distilled student beat the stand-alone network, and is the file ready for the line?"""
    lines, baseline = [], f["baseline"]
    students = [name for name, m in f["models"].items() if m["kind"] == "student" and name != baseline]
    for name in students if baseline else []:
        model = f["models"][name]
        for label, d in [("the mean over the test sets", model["minus_baseline"]),
                         *((s, values["minus_baseline"]) for s, values in model["sets"].items() if len(model["sets"]) > 1)]:
            low, high = d["interval"]
            word, style = ("better than", "good") if low > 0 else ("worse than", "bad") if high < 0 else ("not told apart from", "")
            lines.append(f"On {escape(label)}, <b>{escape(name)}</b> is <b class='{style}'>{word}</b> {escape(baseline)}: "
                         f"{100 * d['difference']:+.1f} points (95 % interval over pictures {100 * low:+.1f} to {100 * high:+.1f}).")
    if not lines:
        best = max(f["models"], key=lambda name: f["models"][name]["mean_accuracy"])
        lines.append(f"Highest mean accuracy: <b>{escape(best)}</b>, {percent(f['models'][best]['mean_accuracy'])} %. "
                     "No baseline was named (--baseline), so nothing is said about differences.")
    for name, model in f["models"].items():
        for label, s in model["sets"].items():
            if point := s.get("operating_point"):
                (goal, target), = point["target"].items()
                rate = point["miss" if goal == "max_miss_rate" else "false_alarm"]
                low, high = rate["interval"]
                verdict = ("<b class='good'>meets</b>" if high <= target else "<b class='bad'>misses</b>" if low > target else "<b>is not shown to meet</b>")
                lines.append(f"{escape(name)} on {escape(label)} {verdict} its target of at most {percent(target)} % "
                             f"{'defects passed' if goal == 'max_miss_rate' else 'good parts rejected'}: {escape(describe_rates(point))}.")
    warnings = shortcut_warnings(f)
    return '<div class="answer">' + "".join(f"<p>{line}</p>" for line in lines + warnings) + "</div>"


def shortcut_warnings(f):
    """Sentences where a classifier that never looks at the part comes near the best model's balanced accuracy."""
    lines = []
    for probe, of_sets in (f["audit"] or {}).get("shortcuts", {}).items():
        for name, scores in of_sets.items():
            if name in f["pictures"]:
                best = max(m["sets"][name]["balanced_accuracy"] for m in f["models"].values())
                chance = 1 / len(f["classes"])
                if scores["balanced_accuracy"] - chance > 0.8 * (best - chance):
                    lines.append(f"<b class='bad'>{escape(name)} does not measure inspection:</b> {escape(probe)} alone reaches {percent(scores['balanced_accuracy'])} % "
                                 f"balanced accuracy, the best model {percent(best)} %.")
    return lines


def models(f):
    """All models by all sets."""
    names = list(f["pictures"])
    head = ["model", "mean, %", *(["minus baseline"] if f["baseline"] else []), *(f"{escape(s)}, %" for s in names),
            *(f"balanced, {escape(s)}" for s in names), "M parameters", "MB", "ms"]
    rows = []
    for name, m in f["models"].items():
        row = [escape(name), f"<b>{percent(m['mean_accuracy'])}</b>"]
        if f["baseline"]:
            d = m["minus_baseline"]
            row.append("" if name == f["baseline"] else f"{100 * d['difference']:+.1f} <small>[{100 * d['interval'][0]:+.1f}, {100 * d['interval'][1]:+.1f}]</small>")
        row += [f"{percent(m['sets'][s]['accuracy'])} <small>[{span(m['sets'][s]['accuracy_interval'])}]</small>" for s in names]
        row += [percent(m["sets"][s]["balanced_accuracy"]) for s in names]
        rows.append([*row, f"{m['parameters'] / 1e6:.1f}", f"{m['bytes'] / 1e6:.1f}", f"{m['latency_ms']:.1f}"])
    text = table(head, rows, f"accuracy with 95 % bootstrap intervals over pictures; ms: one picture at a time on {f['device']}, {f['threads']} threads")
    students = [n for n, m in f["models"].items() if m["kind"] in ("student", "exported")]
    for ensemble in (n for n, m in f["models"].items() if m["kind"] == "ensemble" and students):
        rows = [[escape(n), *(percent(f["models"][n]["sets"][s]["agreement"][ensemble]) for s in names)] for n in students]
        text += table(["student", *map(escape, names)], rows, f"decisions that agree with {ensemble}, %")
    return text


def test_sets(f):
    """Per set, for the shown model: confusion, recall, operating curve, reliability, worst mistakes."""
    name = f["shown"]
    text = f"<p>About <b>{escape(name)}</b>.</p>"
    for set_name, pictures in f["pictures"].items():
        probabilities, labels = f["answers"][name, set_name], pictures.labels.numpy()
        s = f["models"][name]["sets"][set_name]
        text += f"<h3>{escape(set_name)}, {s['n']} pictures</h3>" + confusion(s["confusion_matrix"], f["classes"], set_name)
        text += reliability(probabilities, labels) + operating_curve(f, name, set_name, probabilities, labels)
        text += mistakes(f, set_name, pictures, probabilities, labels)
    return text


def confusion(matrix, classes, set_name):
    rows = []
    for k, (label, counts) in enumerate(zip(classes, matrix)):
        total = sum(counts)
        low, high = wilson(counts[k], total)
        shaded = [f'<span style="background:rgba({"0,158,115" if j == k else "213,94,0"},{0.6 * n / max(total, 1):.2f});padding:.1rem .5rem">{n}</span>'
                  for j, n in enumerate(counts)]
        rows.append([f"<b>{escape(label)}</b>", *shaded, f"{percent(counts[k] / max(total, 1))} <small>[{span((low, high))}]</small>"])
    return table(["true \\ predicted", *map(escape, classes), "recall, %"], rows, f"confusion matrix of {set_name}; recall with 95 % Wilson intervals")


def reliability(probabilities, labels, bins=10):
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    used = [b for b in range(bins) if (bin_of == b).any()]
    found = ([float(confidence[bin_of == b].mean()) for b in used], [float(right[bin_of == b].mean()) for b in used])
    return plot({"calibrated": ([0, 1], [0, 1]), "found": found}, "probability of the decision", "share of right decisions", caption="Reliability.")


def operating_curve(f, name, set_name, probabilities, labels):
    """Miss rate against false-alarm rate over all thresholds, the stored one marked; '' without a good class."""
    point = f["models"][name]["sets"][set_name].get("operating_point")
    if not point or point["miss"]["rate"] is None or point["false_alarm"]["rate"] is None:
        return ""
    good = f["classes"].index(f["good_class"])
    score, defective = 1 - probabilities[:, good], labels != good
    thresholds = np.quantile(score, np.linspace(0, 1, 200))
    curve = ([float((score[~defective] >= t).mean()) for t in thresholds], [float((score[defective] < t).mean()) for t in thresholds])
    mark = (point["false_alarm"]["rate"], point["miss"]["rate"], f"threshold {point['threshold']:.3f}")
    return plot({"thresholds": curve}, "false-alarm rate: good parts rejected", "miss rate: defects passed", points=[mark], caption="Operating curve.")


def worst_mistakes(probabilities, labels):
    """Rows of the WORST pictures that were given the least probability for their class, of the wrong ones."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(probabilities[wrong, labels[wrong]])][:WORST]


def mistakes(f, set_name, pictures, probabilities, labels):
    count, figures = int((probabilities.argmax(1) != labels).sum()), []
    if not count:
        return "<p>No mistakes.</p>"
    for i in worst_mistakes(probabilities, labels):
        text = f"{f['classes'][labels[i]]} taken for {f['classes'][probabilities[i].argmax()]} ({percent(probabilities[i].max(), 0)} %)"
        heat = f["heatmaps"].get(set_name, {}).get(int(i))
        figures.append(f"<figure>{picture(pictures.batch([i])[0].numpy(), text)}{picture(heat, 'evidence') if heat is not None else ''}"
                       f"<figcaption>{escape(text)}<br>{escape(pictures.path(i))}</figcaption></figure>")
    return f"<p>The most confident of {count} mistakes; red: where covering the picture weakens the likeliest defect.</p><div class='pictures'>{''.join(figures)}</div>"


def curves(f):
    runs = {name: rows for name, rows in f["curves"].items() if rows}
    if not runs:
        return "<p>No log.csv beside the models.</p>"
    last = max(float(rows[-1]["steps"]) for rows in runs.values())
    lines = {name: ([float(r["steps"]) for r in rows], [float(r["val_balanced_accuracy"]) for r in rows]) for name, rows in runs.items()}
    top = max(float(r["loss"]) for rows in runs.values() for r in rows)
    losses = {name: ([float(r["steps"]) for r in rows], [float(r["loss"]) for r in rows]) for name, rows in runs.items()}
    return (plot(lines, "steps", "balanced accuracy on validation", (0, last), caption="Validation.", size=(480, 300))
            + plot(losses, "steps", "training loss (each of its own kind)", (0, last), (0, top), caption="Training.", size=(480, 300)))


def audit(f):
    found = f["audit"]
    if found is None:
        return "<p>Not audited: the training pictures are not known (only exported files were named).</p>"
    lines = "".join(f"<li>{escape(line)}</li>" for line in f["audit_lines"]) or "<li>Nothing was found.</li>"
    text = f"<ul>{lines}</ul>"
    names = list(next(iter(found["shortcuts"].values()), {}))
    rows = [[escape(probe), *(percent(scores[s]["balanced_accuracy"]) for s in names)] for probe, scores in found["shortcuts"].items()]
    shown = f["models"][f["shown"]]["sets"]
    rows.append([f"<b>{escape(f['shown'])}</b>", *(percent(shown[s]["balanced_accuracy"]) if s in shown else "" for s in names)])
    text += table(["classifier", *map(escape, names)], rows, "balanced accuracy, %, of classifiers that never look at the part, beside the model")
    if f["copies"]:
        pairs = "".join(f"<figure>{picture(a, 'copy')}{picture(b, 'original')}<figcaption>{escape(c['kind'])}: {escape(c['picture'])} = {escape(c['of'])}"
                        f"{'' if c['labels'][0] == c['labels'][1] or min(c['labels']) < 0 else ' <b>labels differ</b>'}</figcaption></figure>" for c, a, b in f["copies"])
        text += f"<h3>Copies, side by side</h3><div class='pictures'>{pairs}</div>"
    if f["suspicions"]:
        figures = "".join(f"<figure>{picture(pixels, s['picture'])}<figcaption>labelled {escape(s['label'])}, all teachers say {escape(s['suggested'])} "
                          f"({percent(s['probability'], 0)} %)<br>{escape(s['picture'])}</figcaption></figure>" for s, pixels in f["suspicions"])
        text += f"<h3>Labels to look at again</h3><p>All teachers name another class. Where they err often, most of these are their mistakes; nothing was changed.</p><div class='pictures'>{figures}</div>"
    return text


def provenance(f):
    kept = {key: f[key] for key in ("args", "device", "threads", "versions", "test_sets")}
    kept["models"] = {name: {"kind": m["kind"], "sha256": m["sha256"], "made_from": m["made_from"]} for name, m in f["models"].items()}
    return f"<pre>{escape(json.dumps(kept, indent=1))}</pre>"
