"""report.html: what evaluate.py found, as one page that opens from disk, prints, needs no network.

Numbers and pictures are worked out here, as plain data. The page itself, with its words, is written
out in report.html.jinja, which escapes every name.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image, ImageOps

from common.charts import RATES, operating_curve, reliability, training_charts
from common.export import load_exported
from common.files import atomic_path
from common.threshold import wilson
from infer import explain

SHOWN = 12  # pictures of each kind
NEAR = 0.8  # share of the best model's way up from chance that makes a shortcut a warning


def write(findings, answers, pictures, audited, path):
    """Write the page.

    findings: the content of metrics.json; answers: {(model, set): float32 [N, K]}; pictures:
    {set: Pictures} of the test sets; audited: {set: Pictures}, all that the audit saw, {} without
    one; path: of report.html.
    """
    models, baseline = findings["models"], findings["baseline"]
    shown, known = shown_model(models, baseline), {**audited, **pictures}
    page = {
        **findings,
        "shown": shown,
        "answer": answer(models, baseline, shown),
        "warnings": shortcut_warnings(findings),
        "operating_points": operating_points(models),
        "ensembles": of_kind(models, "ensemble"),
        "students": of_kind(models, "student", "exported"),
        "sets": test_sets(findings, answers, pictures, shown),
        "charts": training_charts(of_kind(models, "teacher", "student")),
        "copies": copies(findings["audit"], known),
        "doubts": doubtful_labels(findings["doubtful"], known),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["what"] = what
    text = environment.get_template("report.html.jinja").render(page)
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # not all names are UTF-8


def of_kind(models, *kinds):
    """The names of the models of some kinds."""
    return [name for name, model in models.items() if model["kind"] in kinds]


def what(model):
    """What a model is, in words."""
    if model["kind"] == "exported":
        return "exported student"
    if model["kind"] == "student":
        alpha = model["made_from"].get("args", {}).get("alpha")
        return "distilled student" if alpha else "stand-alone student"
    return model["kind"]


def shown_model(models, baseline):
    """The name of the model that the page is about: the distilled student as it goes to the line.

    An exported file, else a student, else the best ensemble or teacher; float32 before int8. What
    is stand-alone, the baseline and files of its weights come last.
    """
    theirs = weights_of(models[baseline]) if baseline else None
    alone = [weights_of(m) for m in models.values() if what(m) == "stand-alone student"]

    def rank(name):
        weights = weights_of(models[name])
        of_baseline = weights is not None and weights == theirs
        kind = ("exported", "student", "ensemble", "teacher").index(models[name]["kind"])
        error = 1 - models[name]["mean_accuracy"]
        return name == baseline, of_baseline, kind, weights in alone, ".int8" in name, error

    return min(models, key=rank)


def weights_of(model):
    """The hash of its weights, which a checkpoint and its exported files share; else None."""
    return model["made_from"].get("weights_sha256")


def answer(models, baseline, shown):
    """What the first paragraph is about: `name`, compared with the baseline, and the `best` model.

    A checkpoint stands for its exported file: it ran as the baseline did. `verdict` may be None.
    """
    name, verdict = shown, None
    for student in of_kind(models, "student") if shown != baseline else []:
        if weights_of(models[student]) == weights_of(models[shown]) and student != baseline:
            name = student
    if baseline and name != baseline:
        low, high = models[name]["minus_baseline"]["interval"]
        sure = "better than" if low > 0 else "worse than"
        verdict = sure if low > 0 or high < 0 else "not told apart from"
    best = max(models, key=lambda each: models[each]["mean_accuracy"])
    return {"name": name, "verdict": verdict, "best": best}


def operating_points(models):
    """A row per exported file and test set: what its threshold costs there, and the verdict."""
    rows = []
    for name, model in models.items():
        for set_name, scores in model["sets"].items():
            if "operating_point" in scores:
                point = scores["operating_point"]
                ((goal, target),) = point["target"].items()
                low, high = point[RATES[goal]]["interval"]
                verdict = "met" if high <= target else "not shown to be met"
                verdict = "missed" if low > target else verdict
                rows.append({**point, "file": name, "set": set_name, "verdict": verdict})
    return rows


def shortcut_warnings(findings):
    """Where a classifier that never looks at the part comes near the best model."""
    models, chance = findings["models"].values(), 1 / len(findings["classes"])
    shortcuts = findings["audit"]["shortcuts"] if findings["audit"] else {}
    warnings = []
    for name, scores_of in shortcuts.items():
        for set_name, scores in scores_of.items():
            reached = scores["balanced_accuracy"]
            best = max(model["sets"][set_name]["balanced_accuracy"] for model in models)
            if reached - chance > NEAR * (best - chance):
                warnings.append({"set": set_name, "by": name, "reached": reached, "best": best})
    return warnings


def test_sets(findings, answers, pictures, shown):
    """{set: counts, charts and mistakes of the shown model there}."""
    model = findings["models"][shown]
    evidence = evidence_of(shown, model, findings["classes"])
    found = {}
    for name, each in pictures.items():
        probabilities, labels = answers[shown, name], each.labels.numpy()
        scores, charts = model["sets"][name], [reliability(probabilities, labels)]
        if "operating_point" in scores:
            good = findings["classes"].index(model["good_class"])
            defect_scores, point = 1 - probabilities[:, good], scores["operating_point"]
            charts.append(operating_curve(defect_scores, labels != good, point))
        counts = enumerate(scores["confusion_matrix"])
        found[name] = {
            "wrong": int((probabilities.argmax(1) != labels).sum()),
            "recall_intervals": [wilson(row[k], sum(row)) for k, row in counts],
            "charts": charts,
            "mistakes": mistakes(each, probabilities, evidence),
        }
    return found


def evidence_of(path, model, classes):
    """`infer.explain` of an exported file, frame -> evidence; None for another model."""
    if model["kind"] != "exported":
        return None
    network, good = load_exported(path)[0], model["good_class"]
    number = classes.index(good) if good else None

    def student(frames):
        return network(torch.from_numpy(frames)).numpy()

    return lambda frame: explain(student, frame, number)


def mistakes(pictures, probabilities, evidence):
    """The mistakes that left the least probability to the picture's own class."""
    labels = pictures.labels.numpy()
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]])]
    return [
        {
            "image": picture(pictures, i),
            "evidence": overlay(pictures, i, evidence) if evidence else None,
            "label": int(labels[i]),
            "decision": int(probabilities[i].argmax()),
            "probability": float(probabilities[i].max()),
            "picture": pictures.path(i),
        }
        for i in worst[:SHOWN]
    ]


def copies(audit, known):
    """The first copies that the audit found, each with both pictures."""
    found = []
    for copy in audit["copies"][:SHOWN] if audit else []:
        one, other = known[copy["set"]], known[copy["of_set"]]
        pair = {"image": picture(one, copy["row"]), "original": picture(other, copy["of_row"])}
        found.append({**copy, **pair})
    return found


def doubtful_labels(doubtful, known):
    """The first doubtful labels of each set, with their pictures."""
    found = []
    for name, some in doubtful.items():
        found += [{**doubt, "image": picture(known[name], doubt["row"])} for doubt in some[:SHOWN]]
    return found


def picture(pictures, i):
    """Picture i, as the address of an <img>."""
    return address(Image.fromarray(pictures.batch([i])[0].numpy()))


@torch.inference_mode()
def overlay(pictures, i, evidence):
    """`picture`, enlarged, with red where the evidence for the likeliest defect is."""
    frame = pictures.batch([i])[0].numpy()
    heat = evidence(frame)
    image = ImageOps.contain(Image.fromarray(frame), (480, 480))
    mask = Image.fromarray((heat * 160).astype(np.uint8))
    image.paste((230, 20, 20), mask=mask.resize(image.size, Image.Resampling.BICUBIC))
    return address(image)


def address(image):
    """An address that holds the image itself, as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
