"""What evaluate.py writes: a page that opens from disk, prints and needs no network; its numbers.

The page with its words is written out in page.html.jinja, which escapes every name.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image, ImageOps

from common import export, metrics, splits, validation
from common.audit.audit import found_shortcuts
from common.files import atomic_path, save_json
from common.report import charts, tables
from infer import LARGEST, occlusion_map, redden

FILES = ("report.html", "metrics.json", "predictions.csv")
KINDS = ("exported", "student", "ensemble", "teacher")  # of models; the page is about the first
SHOWN = 12  # pictures of each kind
MANY = 30  # classes from which on a confusion matrix gives way to a list of as many
NEAR = 0.8  # share of the best model's way up from chance that makes a shortcut a warning


def compare(results, answers, pictures, baseline):
    """Add to each model how it differs from the baseline, and to students how ensembles agree.

    results: {model: row of metrics.json}; answers: {(model, set): float32 [N, K]}; pictures:
    {set: Pictures}; baseline: the name of a model, or None.
    """
    decisions = {key: probabilities.argmax(1) for key, probabilities in answers.items()}
    right = {(m, of): each == pictures[of].labels.numpy() for (m, of), each in decisions.items()}
    patterns = [result["group_regex"] for result in results.values()]
    pattern = next(filter(None, patterns), None)
    parts = {of: validation.groups_of(each, pattern) for of, each in pictures.items()}
    ensembles = [name for name, result in results.items() if result["kind"] == "ensemble"]
    for name, result in results.items():
        if baseline:
            ours, theirs = ([right[each, of] for of in pictures] for each in (name, baseline))
            result["minus_baseline"] = metrics.difference(ours, theirs, list(parts.values()))
            for of, a, b in zip(pictures, ours, theirs):
                of_set = metrics.difference([a], [b], [parts[of]])
                result["sets"][of]["minus_baseline"] = of_set
        for of, scores in result["sets"].items():
            if result["kind"] in ("student", "exported"):
                same = {each: decisions[name, of] == decisions[each, of] for each in ensembles}
                scores["agreement"] = {each: float(equal.mean()) for each, equal in same.items()}


def untold_by_validation(models):
    """Test sets where accuracy is not what validation promised: the two intervals do not overlap.

    Nor do those of balanced accuracies, else the classes have other shares there, and no more.
    models: {name: row of metrics.json}. Returns plain data, per test set how many models differ so,
    of how many, and both accuracies of the one that differs most.
    """
    found = []
    for of in next(iter(models.values()))["sets"]:
        gaps = []
        for name, model in models.items():
            val, test = model["validation"], model["sets"][of]
            if all(apart(val, test, by) for by in ("accuracy", "balanced_accuracy")):
                gaps.append({"model": name, "val": val["accuracy"], "test": test["accuracy"]})
        if gaps:
            most = max(gaps, key=lambda gap: abs(gap["val"] - gap["test"]))
            found.append({"set": of, "differ": len(gaps), "models": len(models), **most})
    return found


def apart(a, b, by):
    """Whether the 95 % intervals of two shares do not overlap; a, b: of `score`."""
    counts = ((s[by], s.get("trials", s["n"])) for s in (a, b))
    (a_low, a_high), (b_low, b_high) = (metrics.wilson(share * n, n) for share, n in counts)
    return a_low > b_high or b_low > a_high


def write(summary, answers, pictures, audited, folder):
    """Write FILES into a folder.

    summary: the content of metrics.json; answers: {(model, set): float32 [N, K]}; pictures:
    {set: Pictures} of the test sets; audited: {set: Pictures}, all that the audit saw, or {}.
    """
    save_json(summary, folder / "metrics.json")
    tables.write_predictions(answers, pictures, summary["classes"], folder / "predictions.csv")
    models, baseline = summary["models"], summary["baseline"]
    shown = shown_model(models, baseline)
    trained = [name for name, model in models.items() if model["kind"] in ("teacher", "student")]
    sets = {**audited, **pictures}
    height, width = next(iter(pictures.values())).view_size
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    text = environment.get_template("page.html.jinja").render(
        **summary,
        shown=shown,
        compared=compared_model(models, baseline, shown),
        warnings=shortcut_warnings(summary),
        operating_points=tables.operating_points(models),
        details=details(summary, answers, pictures, shown),
        curves=charts.training_charts(trained),
        occlusion=occlusion(shown, models[shown]),
        picture=lambda name, row, heat_of=None: address(sets[name], row, heat_of),
        copies=worst_first(summary["audit"]["copies"] if summary["audit"] else []),
        most=SHOWN,
        wide=width > 1.5 * height,
        metrics=metrics,
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # not all names are UTF-8


def shown_model(models, baseline):
    """The name of the model that the page is about: the distilled student as it goes to the line.

    An exported file, else a student, else the best ensemble or teacher; float32 before int8. What
    is stand-alone, the baseline and files of its weights come last.
    """
    students = [name for name, model in models.items() if model["kind"] == "student"]
    alone = [name for name in students if not models[name]["made_from"]["args"]["alpha"]]
    last = {weights_of(models, name) for name in (*alone, baseline)}

    def rank(name):
        kind, error = KINDS.index(models[name]["kind"]), 1 - models[name]["mean_accuracy"]
        return name == baseline, weights_of(models, name) in last, kind, ".int8" in name, error

    return min(models, key=rank)


def compared_model(models, baseline, shown):
    """The model that the page's first sentence compares with the baseline; None where none is.

    For an exported file that is the checkpoint it was made from, which ran as the baseline did.
    """
    if baseline in (None, shown):
        return None
    for name, model in models.items():
        same = weights_of(models, name) == weights_of(models, shown)
        if model["kind"] == "student" and same and name != baseline:
            return name
    return shown


def weights_of(models, name):
    """The hash of its weights, which a checkpoint and its exported files share; else its name."""
    return models[name]["made_from"].get("weights_sha256", name) if name else None


def shortcut_warnings(summary):
    """Shortcuts of the audit that come near the best model."""
    chance, warnings = 1 / len(summary["classes"]), []
    for by, of, reached in found_shortcuts(summary["audit"]) if summary["audit"] else ():
        best = max(m["sets"][of]["balanced_accuracy"] for m in summary["models"].values())
        if reached - chance > NEAR * (best - chance):
            warnings.append({"set": of, "by": by, "reached": reached, "best": best})
    return warnings


def details(summary, answers, pictures, shown):
    """{set: charts and mistakes of the shown model, furthest from the true class first}."""
    model, by_set = summary["models"][shown], {}
    for name, each in pictures.items():
        p, labels = answers[shown, name], each.labels.numpy()
        curves = [charts.reliability(p, labels)]
        point = model["sets"][name].get("operating_point")
        if point:
            good = metrics.numbers_of(model["good_classes"], summary["classes"])
            parts = validation.groups_of(each, model["group_regex"])
            scores, defective = metrics.defects(p, labels, good, parts)
            if defective.any() and not defective.all():
                curves.append(charts.operating_curve(scores, defective, point))
        wrong = np.flatnonzero(p.argmax(1) != labels)
        wrong = wrong[np.argsort(p[wrong, labels[wrong]])]
        mistakes = [
            {"row": i, "label": labels[i], "decision": p[i].argmax(), "probability": p[i].max(),
             "picture": each.path(i)} for i in wrong[:SHOWN]
        ]
        worst = worst_classes(model["sets"][name]["confusion_matrix"])
        by_set[name] = {"curves": curves, "wrong": len(wrong), "mistakes": mistakes, "worst": worst}
    return by_set


def worst_first(copies):
    """Copies of the audit: first those whose labels differ, then those in test sets."""
    def rank(copy):
        a, b = copy["labels"]
        return a == b or min(a, b) < 0, copy["set"] in splits.TRAINING_SETS
    return sorted(copies, key=rank)


def worst_classes(matrix):
    """The classes with the lowest recall, where there are too many for a confusion matrix; else [].

    matrix: [K][K], rows are true classes. Each as a dict: number, n, right, and taken_for, up to
    three pairs (class, count).
    """
    if len(matrix) <= MANY:
        return []
    rows = []
    for number, counts in enumerate(matrix):
        others = sorted(((n, k) for k, n in enumerate(counts) if n and k != number), reverse=True)
        taken_for = [(k, n) for n, k in others[:3]]
        rows.append({"number": number, "n": sum(counts), "right": counts[number],
                     "taken_for": taken_for})
    present = [row for row in rows if row["n"]]
    return sorted(present, key=lambda row: row["right"] / row["n"])[:MANY]


def occlusion(path, model):
    """`occlusion_map` of an exported file, a function of the frame; None for another model."""
    if model["kind"] != "exported":
        return None
    network, metadata = export.load_exported(path)
    good = metrics.numbers_of(metadata["good_classes"], metadata["classes"])

    def student(frames):
        return network(torch.from_numpy(frames)).numpy()

    return lambda frame: occlusion_map(student, frame, good)


@torch.inference_mode()
def address(pictures, row, heat_of=None):
    """The address of an <img> that holds a picture itself, as JPEG.

    heat_of: function from uint8 [H, W, 3] to float [h, w] in 0..1, laid over it in red.
    """
    frame = pictures.batch([row])[0].numpy()
    image = Image.fromarray(frame)
    if heat_of:
        image = ImageOps.contain(image, (LARGEST, LARGEST))
        redden(image, heat_of(frame))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
