"""Stage 4: measure any mix of teachers, ensembles, students and exported files on any number of test sets.

    python evaluate.py --baseline runs/alone/best.pt                 # everything under runs/, every test* folder
    python evaluate.py runs/student/student.ts --data-dir my_parts
    python evaluate.py runs/ensemble runs/student/best.pt --test-dirs line_1 line_2

Reads   models: best.pt of a teacher or student, a folder of build_ensemble.py, a student.ts
        test sets: DIR/test*/<class>/*, or the folders named with --test-dirs
Writes  runs/report/report.html      the page to look at: answer, tables, figures, mistakes, audit; one file, no network
        runs/report/metrics.json     every number on it, confusion matrices, provenance
        runs/report/metrics.csv      a row per model and test set, for spreadsheets
        runs/report/confusion.txt    the confusion matrices to read

The headline is the mean accuracy over the test sets. Brackets are 95 % bootstrap intervals over test
pictures; they do not hold the spread between training runs: train with several seeds for that.
"""

import csv
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import audit, cli, data, metrics, models, report, tables
from common.checkpoints import file_sha256, load, require_same, save_json, versions
from common.ensemble import load_ensemble
from common.export import load_exported
from common.losses import mixture
from common.operating_point import rates
from common.training import plain_args
from infer import overlay


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("model", nargs="*", help="best.pt, ensemble folder or .ts (default: all under runs/)")
    p.add_argument("--data-dir", help=f"its test* folders are the test sets (default: where the first model found its pictures, "
                   f"or {data.EMBEDDED})")
    p.add_argument("--test-dirs", nargs="+", metavar="DIR", help="test sets by name, instead of --data-dir's")
    p.add_argument("--baseline", metavar="MODEL", help="model that all others are compared with")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=64, help="pictures per forward pass")
    p.add_argument("--output", default="runs/report", help="folder to write")
    cli.add_data_flags(p)
    cli.add_device_flag(p)
    return p.parse_args()


class Subject:
    """One model under test: `probabilities(pictures)`, and what it is.

    A checkpoint or an exported file is one member; an ensemble is its teachers, temperatures and
    weights. `logits_of` caches per member and set, so a teacher that is named alone and in an
    ensemble runs once.
    """

    def __init__(self, path, device, logits_cache):
        self.path, self.device, self.cache = Path(path), device, logits_cache
        self.temperatures, self.weights = [1.0], [1.0]
        if self.path.is_dir():
            record = load_ensemble(self.path)
            self.kind, self.files = "ensemble", [Path(teacher["path"]) for teacher in record["teachers"]]
            self.temperatures, self.weights = record["temperatures"], record["weights"]
            for file, teacher in zip(self.files, record["teachers"]):
                if not file.is_file() or file_sha256(file) != teacher["sha256"]:
                    raise cli.UserError(f"{path}: its teacher {file} is missing or was trained again; build the ensemble again")
        elif not self.path.is_file():
            raise cli.UserError(f"{path}: no such file or folder")
        elif self.path.suffix == ".ts":
            self.kind, self.files = "exported", [self.path]
            record = load_exported(self.path)[1]
        else:
            record = load(self.path)
            self.kind, self.files = record["kind"], [self.path]
        self.suspicions = record.get("suspicions", {})  # an ensemble's, of the training and validation labels
        self.classes = record["data"]["classes"] if "data" in record else record["classes"]
        self.view_size = record["data"]["view_size"] if "data" in record else record["view_size"]
        self.data_record = record.get("data")  # an exported file does not say where its pictures were
        self.made_from = {key: record[key] for key in ("ensemble_sha256", "checkpoint_sha256", "data_fingerprint", "versions", "args", "data", "teachers")
                          if key in record}
        self.good_class, self.point = record.get("good_class"), record.get("operating_point")  # exported files have one
        self.parameters = record.get("parameters")  # freezing an exported file turned them into constants
        self.sha256 = [file_sha256(file) for file in self.files]

    def load(self):
        """The networks, one per file, taking float [B, 3, S, S] in [0, 255]; exported ones give log-probabilities."""
        if self.kind == "exported":
            module = load_exported(self.path)[0]
            return [lambda pixels: module(pixels.cpu().to(torch.uint8)).clamp(min=1e-12).log()]
        return [models.load_model(file, self.device)[0] for file in self.files]

    def probabilities(self, networks, name, pictures, batch_size):
        """float32 [N, classes] on the plain pictures of one test set."""
        for network, digest in zip(networks, self.sha256):
            if (digest, name) not in self.cache:
                self.cache[digest, name] = models.predict(network, pictures, self.device, batch_size)
        return mixture([self.cache[digest, name] for digest in self.sha256], self.temperatures, self.weights)

    def cost(self, networks):
        """Parameters, bytes on disk and median milliseconds for one picture (batch 1, after warm-up)."""
        parameters = self.parameters or sum(p.numel() for network in networks for p in network.parameters())
        pixels = torch.zeros(1, 3, self.view_size, self.view_size, device=self.device)
        times = []
        with torch.inference_mode(), models.autocast(self.device):
            for _ in range(25):
                start = time.perf_counter()
                for network in networks:
                    network(pixels).sum().item()  # .item() waits for the device
                times.append(time.perf_counter() - start)
        return {"parameters": parameters, "bytes": sum(file.stat().st_size for file in self.files),
                "latency_ms": 1e3 * statistics.median(times[5:])}


def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    names = args.model or find_models()
    if args.baseline and args.baseline not in names:
        names = [args.baseline, *names]
    device, cache = cli.pick_device(args.device), {}
    subjects = {name: Subject(name, device, cache) for name in names}
    first = next(iter(subjects.values()))
    for name, subject in subjects.items():
        require_same({"classes": first.classes}, {"classes": subject.classes}, f"{name} against {names[0]}",
                     "models are compared on the same classes")
    known = next((subject.data_record for subject in subjects.values() if subject.data_record), None)
    folders = args.test_dirs or find_test_sets(args.data_dir or (known["dir"] if known else data.EMBEDDED))
    with watch("pictures"):
        sets = {side: data.open_test_sets(folders, side, first.classes, args)
                for side in sorted({subject.view_size for subject in subjects.values()})}

    with watch("audit"):
        audited, audited_sets = audit_with_training(known, sets[first.view_size], args)
        audit_lines = audit.describe(audited, first.classes, known["group_regex"]) if audited else []
        for line in audit_lines:
            print(f"audit: {line}")

    results, answers = {}, {}
    for name, subject in tqdm(subjects.items(), "evaluating", disable=None, leave=False):
        with watch("models"):
            networks = subject.load()
            results[name] = {"kind": subject.kind, "sha256": subject.sha256, "made_from": subject.made_from, "sets": {}, **subject.cost(networks)}
            for set_name, pictures in sets[subject.view_size].items():
                probabilities = subject.probabilities(networks, f"{set_name}@{subject.view_size}", pictures, args.batch_size)
                results[name]["sets"][set_name] = metrics.score(probabilities, pictures.labels)
                if subject.point:
                    good = first.classes.index(subject.good_class)
                    results[name]["sets"][set_name]["operating_point"] = {"threshold": subject.point["threshold"], "target": subject.point["target"], **rates(
                        1 - probabilities[:, good].numpy(), (pictures.labels != good).numpy(), subject.point["threshold"])}
                answers[name, set_name] = probabilities.numpy()
        results[name]["mean_accuracy"] = float(np.mean([s["accuracy"] for s in results[name]["sets"].values()]))
    pictures = sets[first.view_size]
    if args.baseline:
        compare(results, answers, args.baseline, pictures)
    agree(results, answers)

    tables.print_table(results, list(pictures), args.baseline)
    tables.print_operating_points(results)
    output = Path(args.output)
    findings = {"models": results, "classes": first.classes, "baseline": args.baseline, "args": plain_args(args), "audit": audited,
                "suspicions": doubtful_labels(subjects, answers, pictures, audited_sets), "device": str(device), "threads": torch.get_num_threads(), "versions": versions(),
                "test_sets": {name: {"folder": str(each.packs[0].folder), "fingerprint": each.packs[0].fingerprint}
                              for name, each in pictures.items()}}
    save_json(findings, output / "metrics.json")
    tables.write_csv(results, output / "metrics.csv")
    tables.write_confusions(results, first.classes, output / "confusion.txt")
    with watch("report"):
        write_report(findings, subjects, answers, pictures, audited_sets, audit_lines, output / "report.html")
    print(f"{output / 'report.html'}, metrics.json, metrics.csv, confusion.txt")
    print(watch)


def audit_with_training(record, tests, args):
    """(findings, {set: Pictures}) of the test sets against what the models were trained on; (None, {}) where that cannot be had."""
    if record is None:
        print("audit: left out, since an exported file does not say which pictures it was trained on; name its best.pt as well")
        return None, {}
    try:
        train, val, record = data.open_training_data({**record, **({"dir": args.data_dir} if args.data_dir and not args.test_dirs else {})}, args)
        sets = audit.all_sets(train, val, record, tests, args)
    except cli.UserError as error:
        print(f"audit: left out, since the training pictures are not here as they were ({error})")
        return None, {}
    return audit.audit(sets, args.cache_dir), sets


def write_report(findings, subjects, answers, pictures, audited_sets, audit_lines, path):
    """Gather what report.html shows beside the content of metrics.json, and write it."""
    students = [name for name, subject in subjects.items() if subject.kind in ("exported", "student") and name != findings["baseline"]]
    shown = next((name for name in students if subjects[name].kind == "exported"), (students or list(subjects))[0])
    good, heatmaps, classes = subjects[shown].good_class, {}, findings["classes"]
    if subjects[shown].kind == "exported":
        module = load_exported(subjects[shown].path)[0]
        for name, each in pictures.items():
            heatmaps[name] = {int(i): np.asarray(overlay(module, each.batch([i])[0].numpy(), subjects[shown].view_size, classes.index(good) if good else None)[0])
                              for i in report.worst_mistakes(answers[shown, name], each.labels.numpy())}
    copies = [(c, *(audited_sets[c[of]].batch([c[row]])[0].numpy() for of, row in (("set", "row"), ("of_set", "of_row"))))
              for c in (findings["audit"] or {"copies": []})["copies"][:report.WORST]]
    suspicions = [({**s, "label": classes[s["label"]], "suggested": classes[s["suggested"]]}, {**audited_sets, **pictures}[name].batch([s["row"]])[0].numpy())
                  for name, found in findings["suspicions"].items() for s in found[:report.WORST]]
    report.write({**findings, "answers": answers, "pictures": pictures, "heatmaps": heatmaps, "shown": shown, "good_class": good,
                  "curves": {name: read_log(subject.path.parent / "log.csv") for name, subject in subjects.items() if subject.path.name == "best.pt"},
                  "audit_lines": audit_lines, "copies": copies, "suspicions": suspicions}, path)


def doubtful_labels(subjects, answers, pictures, audited_sets):
    """{set: suspicions}: of train and val as build_ensemble.py found them, of the test sets from the teachers' answers."""
    ensemble = next((subject for subject in subjects.values() if subject.kind == "ensemble"), None)
    found = {name: some for name, some in (ensemble.suspicions if ensemble else {}).items() if name in audited_sets and
             all(s["row"] < len(audited_sets[name]) and audited_sets[name].path(s["row"]) == s["picture"] for s in some)}
    teachers = [name for name, subject in subjects.items() if subject.kind == "teacher"]
    for name, each in pictures.items():
        found[name] = audit.doubts(each, [answers[teacher, name] for teacher in teachers])
    return found


def read_log(path):
    """The rows of a training curve, none where there is no such file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def find_models():
    """Everything under runs/ that can be evaluated: teachers, ensembles, students, exported files."""
    kinds = {path: load(path)["kind"] for path in sorted(Path("runs").glob("*/best.pt"))}
    found = [path for path in kinds if kinds[path] == "teacher"]
    found += [path.parent for path in sorted(Path("runs").glob("*/ensemble.json"))]
    found += [path for path in kinds if kinds[path] == "student"]
    found += sorted(Path("runs").glob("*/*.ts"))
    if not found:
        raise cli.UserError("no models under runs/; train some or name their paths")
    return [path.as_posix() for path in found]


def find_test_sets(data_dir):
    folders = data.test_folders(data.data_folder(data_dir))
    if not folders:
        raise cli.UserError(f"{data_dir}: no test* folder; name test sets with --test-dirs")
    return folders


def compare(results, answers, baseline, pictures):
    """Add to each model its paired differences to the baseline, per set and in the mean over sets."""
    set_names = list(pictures)
    right = {(name, s): answers[name, s].argmax(1) == pictures[s].labels.numpy() for name in results for s in set_names}
    for name, result in results.items():
        for set_name in set_names:
            result["sets"][set_name]["minus_baseline"] = metrics.difference([right[name, set_name]], [right[baseline, set_name]])
        result["minus_baseline"] = metrics.difference([right[name, s] for s in set_names], [right[baseline, s] for s in set_names])


def agree(results, answers):
    """Add to each student, per set, the share of its decisions that are each ensemble's."""
    ensembles = [name for name, result in results.items() if result["kind"] == "ensemble"]
    for name, result in results.items():
        for set_name, s in result["sets"].items() if result["kind"] in ("student", "exported") else ():
            s["agreement"] = {e: float((answers[name, set_name].argmax(1) == answers[e, set_name].argmax(1)).mean()) for e in ensembles}


if __name__ == "__main__":
    cli.run(main)
