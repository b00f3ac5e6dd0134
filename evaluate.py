"""Stage 4: measure any mix of teachers, ensembles, students and exported files on any test sets.

    python evaluate.py --baseline runs/alone/best.pt   # everything under runs/, every test* folder
    python evaluate.py runs/student/student.ts --data-dir my_parts
    python evaluate.py runs/ensemble runs/student/best.pt --test-dirs line_1 line_2

Reads   models: best.pt of a teacher or student, a folder of build_ensemble.py, a student.ts
        test sets: DIR/test*/<class>/*, or the folders named with --test-dirs
Writes  runs/report/report.html       the page to look at: answer, tables, mistakes, audit
        runs/report/metrics.json      every number on it, confusion matrices, provenance
        runs/report/predictions.csv   a row per model, test set and picture

The headline is the mean accuracy over the test sets. Brackets are 95 % bootstrap intervals over
test pictures; they do not hold the spread between training runs: train several seeds for that.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import audit, cli, folders, labels, metrics, report, splits, tables
from common.errors import UserError, require_same
from common.files import exclusive, file_sha256, save_json, versions, written_together
from common.losses import product_of_experts
from common.subjects import find_models, measure, open_subject
from common.threshold import rates

PROVENANCE = (
    "weights_sha256", "ensemble_sha256", "data_fingerprint", "teachers", "data", "args", "versions",
)


def parse_arguments():
    p = cli.parser(__doc__)
    p.add_argument("model", nargs="*",
                   help="best.pt, ensemble folder or .ts (default: all under runs/, but for the "
                   "exported files of a stand-alone student)")
    p.add_argument("--baseline", metavar="MODEL", help="model that all others are compared with")
    p.add_argument("--data-dir",
                   help="its test* folders are the test sets (default: where the first model found "
                   "its pictures; an exported file does not say)")
    p.add_argument("--test-dirs", nargs="+", metavar="DIR",
                   help="test sets by name, instead of --data-dir's")
    p.add_argument("--skip-audit", action="store_true",
                   help="do not look for copies and shortcuts in the pictures")
    p.add_argument("--output", default="runs/report", help="folder to write")
    p.add_argument("-b", "--batch-size", type=cli.positive_int, default=64,
                   help="pictures per forward pass")
    cli.add_device_flag(p)
    cli.add_reading_flags(p)
    return p.parse_args()


def main():
    watch, args = cli.Stopwatch(), parse_arguments()
    with exclusive(args.output):
        report_on_all(args, watch)
    print(watch)


def report_on_all(args, watch):
    """Measure every model on every test set, look for doubts, and write the report."""
    names, baseline = name_models(args)
    device = cli.pick_device(args.device)

    # What is to be measured, on what.
    subjects = open_subjects(names)
    first = subjects[names[0]].pictures
    known = [subject.data for subject in subjects.values() if subject.data]
    tests = open_tests(subjects, known, args)
    pictures = tests[first["view_size"], first["white_level"]]
    watch.lap("pictures")

    # Can the pictures be trusted?
    found, lines = None, []
    audited = {} if args.skip_audit else training_sets(known, subjects, args)
    if audited:
        audited = {**audited, **pictures}
        found = audit.audit(audited, cli.CACHE)
        lines = audit.describe(found, first["classes"], known[0]["group_regex"])
    print("".join(f"audit: {line}\n" for line in lines), end="")
    watch.lap("audit")

    # What do the models say, and which is better?
    results, answers = evaluate(subjects, tests, device, args.batch_size)
    watch.lap("models")
    if baseline:
        compare(results, answers, baseline, pictures)
    add_agreement(results, answers)
    tables.print_table(results, list(pictures), baseline)
    tables.print_operating_points(results)
    findings = {
        "models": results,
        "classes": first["classes"],
        "baseline": baseline,
        "audit": found,
        "audit_lines": lines,
        "doubtful": doubtful_labels(subjects, answers, pictures, audited),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "args": cli.plain(args),
        "versions": versions(),
        "test_sets": describe_sets(pictures),
    }
    with written_together(args.output) as folder:
        save_json(findings, folder / "metrics.json")
        tables.write_predictions(answers, pictures, first["classes"], folder / "predictions.csv")
        report.write(findings, answers, pictures, audited, folder / "report.html")
    watch.lap("report")
    print(f"{Path(args.output) / 'report.html'}, metrics.json, predictions.csv")


def name_models(args):
    """(names, baseline) of the models to measure; the baseline is one of them, or None."""
    names = [Path(name).as_posix() for name in args.model or find_models()]
    baseline = Path(args.baseline).as_posix() if args.baseline else None
    if baseline:
        same = [name for name in names if Path(name).resolve() == Path(baseline).resolve()]
        baseline = same[0] if same else baseline
        names = names if same else [baseline, *names]
    return names, baseline


def open_subjects(names):
    """{name: `Subject`}. Raises UserError where one is for other classes."""
    subjects = {name: open_subject(name) for name in names}
    classes = subjects[names[0]].pictures["classes"]
    for name, subject in subjects.items():
        require_same(
            {"classes": classes},
            {"classes": subject.pictures["classes"]},
            f"{name} against {names[0]}",
            "models are compared on the same classes",
        )
    return subjects


def evaluate(subjects, tests, device, batch_size):
    """(results, answers): a row of metrics.json per model, and {(model, set): float32 [N, K]}."""
    measured, answers, results = {}, {}, {}
    for name, subject in tqdm(subjects.items(), "evaluating", disable=None, leave=False):
        sets = tests[subject.pictures["view_size"], subject.pictures["white_level"]]
        for file in subject.files:  # every file runs once, however many ensembles it is part of
            if file not in measured:
                measured[file] = measure(file, subject, sets, device, batch_size)
        members = [measured[file] for file in subject.files]
        for set_name in sets:
            logits = [member.logits[set_name] for member in members]
            probabilities = product_of_experts(logits, subject.temperatures, subject.weights)
            answers[name, set_name] = probabilities.numpy()
        results[name] = summarise(name, subject, members, answers, sets)
    return results, answers


def open_tests(subjects, known, args):
    """{(view size, white level): {set: Pictures}}: the test sets as each model wants them."""
    named = args.test_dirs
    if not named:
        data_dir = args.data_dir or (known[0]["dir"] if known else None)
        if data_dir is None:
            raise UserError(
                "an exported file does not say where its pictures are; "
                "give --data-dir or --test-dirs, or add the best.pt it was made from"
            )
        named = folders.test_folders(folders.data_folder(data_dir))
        if not named:
            raise UserError(f"{data_dir}: no test* folder; name test sets with --test-dirs")
    cache, tests = cli.decoded_cache(args), {}
    for subject in subjects.values():
        key = subject.pictures["view_size"], subject.pictures["white_level"]
        if key not in tests:
            tests[key] = splits.open_tests(cache, named, subject.pictures)
    return tests


def training_sets(known, subjects, args):
    """The pictures the models learnt from, {"train", "val", "unlabelled"}; {} if not here."""
    if not known:
        print("audit: left out; an exported file does not say which pictures it was trained on")
        return {}
    moved = {}
    if args.data_dir and (Path(args.data_dir) / "train").is_dir() and not args.test_dirs:
        moved = {"dir": args.data_dir}
    cache = cli.decoded_cache(args)
    try:
        train, val, data = splits.open_training(cache, {**known[0], **moved})
    except UserError as error:
        print(f"audit: left out, since the training pictures are not here as they were ({error})")
        return {}
    sets = {"train": train, "val": val}

    # The pool of the ensemble; of students alone what lies in the data folder.
    ensembles = [s.record["unlabelled"] for s in subjects.values() if s.kind == "ensemble"]
    try:
        if ensembles and ensembles[0]:
            sets["unlabelled"] = splits.open_same_pool(cache, None, data, ensembles[0])
        elif not ensembles and folders.pool_folder(data["dir"]):
            pool = folders.pool_folder(data["dir"])
            sets["unlabelled"] = splits.open_unlabelled(cache, pool, data)
    except UserError as error:
        print(f"audit: without the unlabelled pictures ({error})")
    return sets


def summarise(name, subject, members, answers, sets):
    """One model's row of metrics.json. An ensemble costs what its teachers cost together."""
    scores = {}
    point = subject.record.get("operating_point")
    for set_name, pictures in sets.items():
        probabilities = answers[name, set_name]
        scores[set_name] = metrics.score(probabilities, pictures.labels)
        if point:
            good = subject.record["classes"].index(subject.record["good_class"])
            defective = (pictures.labels != good).numpy()
            found = rates(1 - probabilities[:, good], defective, point["threshold"])
            kept = {key: point[key] for key in ("threshold", "target")}
            scores[set_name]["operating_point"] = {**kept, **found}
    made_from = {key: subject.record[key] for key in PROVENANCE if key in subject.record}
    if subject.kind == "exported":
        made_from["sha256"] = file_sha256(subject.files[0])
    return {
        "kind": subject.kind,
        "sets": scores,
        "mean_accuracy": float(np.mean([s["accuracy"] for s in scores.values()])),
        "parameters": sum(member.parameters for member in members),
        "bytes": sum(member.bytes for member in members),
        "latency_ms": sum(member.latency_ms for member in members),
        "latency_device": members[0].device,
        "good_class": subject.record.get("good_class"),
        "made_from": made_from,
    }


def describe_sets(pictures):
    """Where each test set lies and what it was, as plain data."""
    return {
        name: {"folder": str(each.parts[0].folder), "fingerprint": each.fingerprint()}
        for name, each in pictures.items()
    }


def compare(results, answers, baseline, pictures):
    """Add to each model its paired differences to the baseline, per set and over all sets."""
    right = {}
    for (name, set_name), probabilities in answers.items():
        right[name, set_name] = probabilities.argmax(1) == pictures[set_name].labels.numpy()
    for name, result in results.items():
        ours = [right[name, set_name] for set_name in pictures]
        theirs = [right[baseline, set_name] for set_name in pictures]
        result["minus_baseline"] = metrics.difference(ours, theirs)
        for set_name, a, b in zip(pictures, ours, theirs):
            result["sets"][set_name]["minus_baseline"] = metrics.difference([a], [b])


def add_agreement(results, answers):
    """Add to each student, per set, the share of its decisions that are each ensemble's."""
    ensembles = [name for name, result in results.items() if result["kind"] == "ensemble"]
    for name, result in results.items():
        if result["kind"] not in ("student", "exported"):
            continue
        for set_name, s in result["sets"].items():
            decisions = answers[name, set_name].argmax(1)
            s["agreement"] = {
                ensemble: float((decisions == answers[ensemble, set_name].argmax(1)).mean())
                for ensemble in ensembles
            }


def doubtful_labels(subjects, answers, pictures, audited):
    """{set: doubtful labels}: of train and val as build_ensemble.py found them, of tests anew."""
    found = {}
    for subject in subjects.values():
        for name, some in subject.record.get("doubtful", {}).items():
            paths = audited[name].paths() if name in audited else []
            same = all(d["row"] < len(paths) and paths[d["row"]] == d["picture"] for d in some)
            if same and paths:
                found[name] = some
    teachers = [name for name, subject in subjects.items() if subject.kind == "teacher"]
    for name, each in pictures.items():
        found[name] = labels.doubtful_pictures(each, [answers[t, name] for t in teachers])
    return found


if __name__ == "__main__":
    cli.run(main)
