"""Stage 4: measure any mix of teachers, ensembles, students and exported files on any test sets.

    python evaluate.py --baseline runs/alone/model.pt   # everything under runs/, every test* folder
    python evaluate.py runs/student/student.ts --data-dir my_parts
    python evaluate.py runs/ensemble runs/student/model.pt --test-dirs line_1 line_2

Reads   models: model.pt of a teacher or student, a folder of build_ensemble.py, a .ts or .onnx file
        test sets: DIR/test*/<class>/*, or the folders named with --test-dirs
Writes  runs/report/report.html       the page to look at: answer, tables, mistakes, audit
        runs/report/metrics.json      every number on it, confusion matrices, provenance
        runs/report/predictions.csv   a row per model, test set and picture

The headline is the mean accuracy over the test sets. Brackets are 95 % intervals over test
pictures: Wilson's of a share, Agresti and Min's of a difference, while the exact sign test decides
what is better. Pictures of one part count together where the training's --group-regex names parts.
What differs between training runs is not in the intervals: train several seeds for that.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import cli, export, folders, metrics, models, report, splits, validation
from common.audit import audit
from common.audit.label_errors import label_errors_of_sets
from common.ensemble import load_ensemble
from common.files import (
    UserError,
    exclusive,
    file_sha256,
    require_same,
    some_of,
    versions,
    written_together,
)
from common.losses import product_of_experts

MADE_FROM = "weights_sha256 ensemble_sha256 data_fingerprint teachers dataset args versions".split()


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("model", nargs="*",
                   help="model.pt, ensemble folder, .ts or .onnx (default: all under runs/, but "
                   "for the exported files of a stand-alone student)")
    p.add_argument("--baseline", metavar="MODEL", help="model that all others are compared with")
    p.add_argument("--data-dir",
                   help="its test* folders are the test sets, its other ones are audited (default: "
                   "where the first model found its pictures; an exported file does not say)")
    p.add_argument("--test-dirs", nargs="+", action="extend", metavar="DIR",
                   help="test sets by name, instead of --data-dir's")
    p.add_argument("--skip-audit", action="store_true",
                   help="do not look for copies and shortcuts in the pictures")
    p.add_argument("--output", default="runs/report", help="folder to write (default: %(default)s)")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=64,
                   help="pictures per forward pass (default: %(default)s)")
    cli.add_common_flags(p)
    return p.parse_args()


def main():
    args = parse_arguments()
    with exclusive(args.output):
        evaluate(args)
    cli.print_laps()


def evaluate(args):
    """Measure every model on every test set, audit the pictures, and write the report."""
    # What is to be measured, on what.
    names, baseline = name_models(args.model or find_models(), args.baseline)
    device, cache = cli.pick_device(args.device), cli.decoded_cache(args)
    tested = open_models(names)
    first = tested[names[0]]
    trained, lines = first_trained(tested)
    lines += trained_unlike(tested, baseline)
    dataset = trained and trained.dataset
    if args.data_dir:
        folders.data_folder(args.data_dir)  # refuses a wrong one, also beside --test-dirs
    test_dirs = args.test_dirs or find_tests(args.data_dir or (dataset and dataset["dir"]))
    wanted = {model.reading: model.dataset for model in tested.values()}
    tests = {
        reading: splits.open_tests(cache, test_dirs, each) for reading, each in wanted.items()
    }
    pictures = tests[first.reading]
    cli.lap("pictures")

    # Can the pictures be trusted?
    audited, findings = {}, None
    if not args.skip_audit:
        specs = [model.header for model in tested.values() if model.kind == "ensemble"]
        audited = audit.open_training_sets(cache, dataset, specs, args.data_dir)
    if audited:
        audited |= tests[trained.reading]
        findings = audit.audit(cache, dataset, audited)
        lines += audit.audit_lines(findings, first.dataset["classes"], dataset["group_regex"])
    print("".join(f"audit: {line}\n" for line in lines), end="")
    cli.lap("audit")

    # What do the models say, and which is better?
    good = good_numbers(tested, first.dataset["classes"])
    results, answers = run_models(tested, tests, good, device, args.batch_size)
    report.compare(results, answers, pictures, baseline)
    cli.lap("models")
    summary = {
        "models": results,
        "classes": first.dataset["classes"],
        "good_classes": [first.dataset["classes"][number] for number in good],
        "baseline": baseline,
        "audit": findings,
        "audit_lines": lines,
        "untold": report.untold_by_validation(results),
        "label_errors": find_label_errors(tested, answers, pictures, audited),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "args": vars(args),
        "versions": versions(),
        "test_sets": {
            name: {"folder": str(each.sources[0].folder), "fingerprint": each.fingerprint()}
            for name, each in pictures.items()
        },
    }
    report.tables.print_tables(summary)
    shown = tested[report.shown_model(results, baseline)]  # sees pictures as it reads them
    pictures = tests[shown.reading]
    with written_together(args.output, report.FILES) as folder:
        report.write(summary, answers, pictures, audited, folder)
    cli.lap("report")
    print(f"{Path(args.output) / 'report.html'}, metrics.json, predictions.csv")


def find_label_errors(tested, answers, pictures, audited):
    """{set: label errors}: of train and val as build_ensemble.py found them, of tests anew."""
    stored = [model.header.get("label_errors", {}) for model in tested.values()]
    teachers = [name for name, model in tested.items() if model.kind == "teacher"]
    theirs = {name: [answers[teacher, name] for teacher in teachers] for name in pictures}
    return label_errors_of_sets(stored, audited, pictures, theirs)


# --------------------------------------------------------------------------- models and test sets


@dataclass(frozen=True)
class Model:
    """A model under test, not loaded yet.

    kind: teacher, student, ensemble or exported; header: what it says of itself, a checkpoint's
    state, an ensemble's spec or an exported file's metadata; dataset: of its training, of an
    exported file its metadata, which do not say where the pictures lie. An ensemble has a file per
    teacher, with temperatures and weights; any other model is one file.
    """

    kind: str
    header: dict
    dataset: dict
    files: list
    temperatures: tuple = (1.0,)
    weights: tuple = (1.0,)

    @property
    def validation(self):
        """What it reached on its validation pictures: accuracy, n and others."""
        if self.kind == "ensemble":
            return self.header["validation"]["the ensemble"]
        return self.header["validation" if self.kind == "exported" else "metrics"]

    @property
    def reading(self):
        """How it wants pictures to be read: (view size, white level)."""
        return tuple(self.dataset["view_size"]), self.dataset["white_level"]


def find_models():
    """Paths of everything under runs/ worth comparing; leaves out .onnx files that cannot run."""
    headers = models.trained_runs()
    students = [path for path, header in headers.items() if header["kind"] == "student"]
    paths = [path for path in headers if path not in students]
    paths += [path.parent for path in sorted(Path("runs").glob("*/ensemble.json"))]
    paths += students
    for path in students:
        if headers[path]["args"]["alpha"]:  # a stand-alone student is a baseline; nobody ships it
            paths += sorted(path.parent.glob("*.ts")) + sorted(path.parent.glob("*.onnx"))
    onnx = [path for path in paths if path.suffix == ".onnx"]
    if onnx and find_spec("onnxruntime") is None:
        paths = [path for path in paths if path not in onnx]
        print(f"left out {', '.join(map(str, onnx))}: pip install onnxruntime to measure them too")
    if not paths:
        raise UserError("no models under runs/; train some or name their paths")
    return paths


def name_models(paths, baseline):
    """(names, baseline) of the models to measure; the baseline is one of them, or None."""
    names = [Path(path).as_posix() for path in paths]
    if baseline is None:
        return names, None
    same = [name for name in names if Path(name).resolve() == Path(baseline).resolve()]
    baseline = Path(baseline).as_posix()
    return (names, same[0]) if same else ([*names, baseline], baseline)


def open_models(names):
    """{name: `Model`}, of the same classes; says whose ensemble is not among them."""
    tested = {name: open_model(Path(name)) for name in names}
    classes = tested[names[0]].dataset["classes"]
    for name, model in tested.items():
        what, remedy = f"{name} against {names[0]}", "compare models of the same classes"
        require_same({"classes": classes}, {"classes": model.dataset["classes"]}, what, remedy)
    if others := of_other_ensembles(tested):
        print(f"{some_of(others)}: of an ensemble that is none of those measured beside it")
    return tested


def open_model(path):
    """The `Model` at a path. Raises UserError for what is none of this project."""
    if path.is_dir():
        if (path / "model.pt").is_file() and not (path / "ensemble.json").is_file():
            raise UserError(f"{path}: a run's folder; name the file in it, {path / 'model.pt'}")
        spec = load_ensemble(path)
        if changed := next(models.changed_teachers(spec), None):
            raise UserError(
                f"{path}: its teacher {changed} is missing, damaged or was trained again; run "
                "build_ensemble.py --overwrite, or name the models to measure"
            )
        files = [Path(teacher["path"]) for teacher in spec["teachers"]]
        combination = spec["temperatures"], spec["weights"]
        return Model("ensemble", spec, spec["dataset"], files, *combination)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix in (".ts", ".onnx"):
        metadata = export.load_exported(path)[1]
        return Model("exported", metadata, metadata, [path])
    state = models.read_header(path)
    return Model(state["kind"], state, state["dataset"], [path])


def of_other_ensembles(tested):
    """Names of distilled students whose ensemble is not under test, where one is at all."""
    ensembles = [name for name, model in tested.items() if model.kind == "ensemble"]
    known = {None, *(file_sha256(Path(name, "ensemble.json")) for name in ensembles)}
    distilled = {name: model.header for name, model in tested.items()
                 if model.header.get("args", {}).get("alpha", 1)}
    return [name for name, header in distilled.items()
            if ensembles and header.get("ensemble_sha256") not in known]


def first_trained(tested):
    """(the first `Model` that says where its training pictures lie, or None; lines for people).

    The line names those that were trained on others or on another split.
    """
    first = next((model for model in tested.values() if "dir" in model.dataset), None)
    others = [name for name, model in tested.items() if first and trained_on_others(model, first)]
    said = f"{some_of(others)}: trained on other pictures than the models before"
    unseen = "so test pictures may be among them, and the audit does not look there"
    lines = [f"{said}, {unseen}"] if others else []
    known = {model.header["weights_sha256"] for model in tested.values() if model.kind == "student"}
    silent = [name for name, model in tested.items() if first and "dir" not in model.dataset
              and model.reading != first.reading and model.header["weights_sha256"] not in known]
    if silent:
        lines.append(f"{some_of(silent)}: at another view size an exported file does not say on "
                     f"which pictures it was trained, {unseen}; measure its model.pt too")
    return first, lines


def trained_unlike(tested, baseline):
    """Lines for people: which distilled students were not trained as the baseline, one too, was."""
    students = {name: how_trained(model.header) for name, model in tested.items()
                if model.kind == "student"}
    theirs, lines = students.pop(baseline, None), []
    for name, ours in students.items() if theirs else ():
        if unlike := [f"{key} {ours[key]} against {theirs[key]}"
                      for key in ours if ours[key] != theirs[key]]:
            lines.append(f"{name}: trained otherwise than the baseline {baseline} "
                         f"({', '.join(unlike)}), so what it gains is not the teachers' alone")
    return lines


def how_trained(header):
    """What decides how well a student learns, but for teachers and chance, as plain data."""
    flags, schedule = header["args"], header["schedule"]
    kept = ("batch_size", "weight_decay", "balance_classes", "mixup")
    return {
        "start": flags.get("weights") or flags.get("pretrained") or "from scratch",
        **{key: schedule[key] for key in ("steps", "lr", "clip_grad")},
        **{key: flags.get(key) or False for key in kept},
        "img_size": header["img_size"],
    }


def trained_on_others(model, first):
    """Whether a `Model` learnt from other pictures than the first, however these validate.

    Fingerprints are compared between models of one view size alone, folders between others.
    """
    theirs, ours = ({"fingerprint": each.header.get("data_fingerprint"), **each.dataset}
                    for each in (model, first))
    for each in (theirs, ours):
        each["dir"] = each.get("dir") and Path(each["dir"]).resolve()
    kept = ["fingerprint" if model.reading == first.reading else "dir", "dropped"]
    return any(theirs.get(key) is not None and theirs[key] != ours[key] for key in kept)


def find_tests(data_dir):
    """The test* folders of a data folder; data_dir: None where no model says which."""
    if data_dir is None:
        raise UserError(
            "an exported file does not say where its pictures are; "
            "give --data-dir or --test-dirs, or add the model.pt it was made from"
        )
    found = folders.test_folders(folders.data_folder(data_dir))
    if not found:
        raise UserError(f"{data_dir}: no test* folder; name test sets with --test-dirs")
    return found


# ------------------------------------------------------------------------------------ measurements


def good_numbers(tested, classes):
    """Numbers of the classes that are no defect, as a file or a student says, or by their names.

    A line says so where they do not agree.
    """
    headers = [model.header for model in tested.values()]
    told = [each.get("good_classes") for each in headers]
    told += [each["args"]["good_class"] for each in headers if each.get("kind") == "student"]
    told = list(filter(None, told))
    good = metrics.good_classes(classes, told[0] if told else None)
    if any(set(each) != set(good) for each in told):
        print(f"warning: the models call other classes good; AUROC is of {', '.join(good)}")
    return metrics.numbers_of(good, classes)


def run_models(tested, tests, good, device, batch_size):
    """(results, answers): a row of metrics.json per model, and {(model, set): float32 [N, K]}.

    good: numbers of the good classes.
    """
    outputs, results, answers = {}, {}, {}
    for name, model in tqdm(tested.items(), "evaluating", disable=None, leave=False):
        sets = tests[model.reading]
        for file in model.files:  # every file runs once, however many ensembles it is part of
            if file not in outputs:
                outputs[file] = run_file(file, model, sets, device, batch_size)
        scores = {}
        for of, pictures in sets.items():
            logits = [outputs[file][0][of] for file in model.files]
            together = product_of_experts(logits, model.temperatures, model.weights)
            answers[name, of] = together.numpy()
            scores[of] = score(model, answers[name, of], pictures, good)
        made_from = {key: model.header[key] for key in MADE_FROM if key in model.header}
        if model.kind == "exported":
            made_from["sha256"] = file_sha256(model.files[0])
        costs = [outputs[file][1] for file in model.files]
        results[name] = {
            "kind": model.kind,
            "sets": scores,
            "mean_accuracy": float(np.mean([each["accuracy"] for each in scores.values()])),
            **{key: sum(cost[key] for cost in costs) for key in costs[0]},  # teachers' together
            "latency_device": "cpu" if model.kind == "exported" else str(device),
            "good_classes": model.header.get("good_classes", []),
            "group_regex": model.dataset["group_regex"],
            "validation": model.validation,
            "made_from": made_from,
        }
    return results, answers


def run_file(file, model, sets, device, batch_size):
    """({set: logits, float32 [N, K]}, what the file costs) on test sets, {set: Pictures}."""
    if model.kind == "exported":  # its parameters are constants, and it was made for a CPU
        parameters, device = model.header["parameters"], torch.device("cpu")
        student = export.load_exported(file)[0]

        def network(pixels):
            with torch.autocast("cpu", enabled=False):  # as a device runs it
                frames = pixels.to(torch.uint8).permute(0, 2, 3, 1)
                return student(frames).clamp(min=1e-37).log()
    else:
        network = models.load_model(file, device)[0]
        parameters = sum(p.numel() for p in network.parameters())
    logits = {of: models.predict(network, each, device, batch_size) for of, each in sets.items()}
    milliseconds = latency(network, model.dataset["view_size"], device)
    size = file.stat().st_size
    return logits, {"parameters": parameters, "bytes": size, "latency_ms": milliseconds}


@torch.inference_mode()
def latency(network, view_size, device, times=25, warm_up=5):
    """Median milliseconds for one picture of view_size, [H, W], in the device's precision."""
    pixels, seconds = torch.zeros(1, 3, *view_size, device=device), []
    with models.autocast(device):
        for _ in range(times):
            start = time.perf_counter()
            network(pixels).sum().item()  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[warm_up:]))


def score(model, probabilities, pictures, good):
    """All metrics of a model on one test set; of a file with a threshold also what that does there.

    probabilities: of the `Pictures`, float [N, K]; good: numbers of the good classes.
    """
    labels = pictures.labels.numpy()
    parts = validation.groups_of(pictures, model.dataset["group_regex"])
    scores = metrics.score(probabilities, labels, good, parts)
    if point := model.header.get("operating_point"):
        good = metrics.numbers_of(model.header["good_classes"], model.header["classes"])
        scored = metrics.defects(probabilities, labels, good, parts)
        scores["operating_point"] = {**point, **metrics.rates(*scored, point["threshold"])}
    return scores


if __name__ == "__main__":
    cli.run(main)
