"""evaluate.py's verdicts, thresholds and charts, where models say what a test wants them to say."""

import html
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, call, make_set

import evaluate
from common import export, metrics, models
from common.files import save_json

TEACHERS = ("runs/test_resnet/model.pt", "--baseline", "runs/test_vit/model.pt")
QUICK = ("--skip-audit", *CPU, "--output")


@pytest.fixture
def logits_of(monkeypatch):
    """Replace what models say: a function takes the labels of a test set and returns its logits."""

    def replace(*functions):
        turns = iter(functions)  # one per model and test set; the baseline's comes last

        def predict(network, pictures, device, batch_size):
            return next(turns)(pictures.labels)

        monkeypatch.setattr(models, "predict", predict)

    return replace


def right_but_for(count):
    """Logits that are right but for the first `count` pictures, whose class is the next one."""

    def logits(labels):
        decisions = labels.clone()
        decisions[:count] = (labels[:count] + 1) % 3
        return 5 * F.one_hot(decisions, 3).float()

    return logits


def read(folder):
    """(the page as text with single spaces, its source, metrics.json)."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())
    return text, page, json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("wins, said, p", [
    (4, "not told apart from", 0.125), (6, "better than", 0.031),
])
def test_better_than_is_what_the_exact_sign_test_says(inside, tmp_path, logits_of, wins, said, p):
    logits_of(right_but_for(0), right_but_for(wins))
    assert call(evaluate.main, *TEACHERS, "--test-dirs", "parts/test", *QUICK, tmp_path) == 0
    text, _, content = read(tmp_path)
    assert list(content["models"]) == [TEACHERS[0], TEACHERS[2]]  # the first says which pictures
    d = content["models"][TEACHERS[0]]["minus_baseline"]
    assert (d["interval"][0] > 0) == (said == "better than")  # the two agree here
    assert (d["wins"], d["losses"]) == (wins, 0)
    low, high = (f"{100 * value:+.1f}" for value in d["interval"])
    answer = (
        f"The teacher {TEACHERS[0]} is {said} the baseline {TEACHERS[2]}: "
        f"{100 * wins / 60:+.1f} points on test (95 % interval {low} to {high}; "
        f"{wins} wins to 0 losses, p = {p:.3f})."
    )
    assert answer in text
    assert f"[{low} to {high}] {wins} wins to 0 losses, p = {p:.3f}" in text  # in the table


def test_intervals_are_called_what_they_are(inside, tmp_path, logits_of, capfd):
    logits_of(right_but_for(0), right_but_for(4))
    assert call(evaluate.main, *TEACHERS, "--test-dirs", "parts/test", *QUICK, tmp_path) == 0
    text, printed = read(tmp_path)[0], capfd.readouterr().out
    low, high = metrics.wilson(56, 60)
    assert f"[{100 * low:.1f} to {100 * high:.1f}]" in text
    assert f"[{low:.4f}, {high:.4f}]" in printed
    assert "Wilson's of a share, Agresti and Min's of a difference" in text
    assert "[95 % intervals], Wilson's of accuracies, Agresti and Min's of differences" in printed


@pytest.mark.parametrize("missed, verdict", [(0, "met"), (2, "not shown to be met"), (8, "missed")])
def test_a_target_is_met_where_the_exact_bound_on_this_set_says_so(
    inside, tmp_path, logits_of, missed, verdict
):
    parts = make_set(tmp_path / "sets", {"test": 30})  # 60 defects; 59 without a miss show 5 %
    logits_of(right_but_for(missed))
    words = ("runs/student/student.ts", "--test-dirs", parts / "test", *QUICK, tmp_path)
    assert call(evaluate.main, *words) == 0
    text, _, content = read(tmp_path)
    scores = content["models"][words[0]]["sets"]["test"]
    point, auroc = scores["operating_point"], scores["auroc"]
    assert content["good_classes"] == ["level"] and f"AUROC {100 * auroc:.1f}" in text
    assert (point["miss"]["count"], point["miss"]["n"]) == (missed, 60)
    assert f"at most 5 % of the defects missed, is {verdict} on test" in text
    missed_share, alarm = (100 * point[goal]["rate"] for goal in ("miss", "false_alarm"))
    answer = f"misses {missed_share:.1f} % of the defects and rejects {alarm:.1f} % of the good"
    assert answer in text
    counts = [f"{point[goal]['count']} of {point[goal]['n']}" for goal in ("miss", "false_alarm")]
    assert re.search(f"{counts[0]} {missed_share:.1f} % .*{counts[1]} {alarm:.1f} %", text)
    promise = f"{point['pictures']} validation defects promise {100 * point['promised']:.1f} %"
    assert f"{promise}; 59 are needed {verdict}" in text  # one cell beside the other


def test_a_defect_score_that_float32_cannot_tell_from_zero_by_subtraction_counts(
    inside, tmp_path, logits_of, monkeypatch
):
    def with_a_low_threshold(path, load=export.load_exported):
        student, metadata = load(path)
        point = {**metadata["operating_point"], "threshold": 1e-9}
        return student, {**metadata, "operating_point": point}

    monkeypatch.setattr(export, "load_exported", with_a_low_threshold)
    logits_of(lambda labels: torch.tensor([-19.0, 0.0, -19.0]).repeat(len(labels), 1))
    parts = make_set(tmp_path / "sets", {"test": 2})
    words = ("runs/student/student.ts", "--test-dirs", parts / "test", *QUICK, tmp_path)
    assert call(evaluate.main, *words) == 0
    point = read(tmp_path)[2]["models"][words[0]]["sets"]["test"]["operating_point"]
    assert point["miss"]["count"] == 0 and point["false_alarm"]["count"] == 2  # 1.1e-8 each


def test_the_curve_of_reliability_has_the_bins_of_the_ece_beside_it(inside, tmp_path, logits_of):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60, 3, generator=generator)
    labels = torch.arange(3).repeat_interleave(20)
    logits_of(lambda of_set: logits)
    words = ("runs/test_vit/model.pt", "--test-dirs", "parts/test", *QUICK, tmp_path)
    assert call(evaluate.main, *words) == 0
    chart = re.search('<figcaption>Reliability.*?points="([^"]*)"', read(tmp_path)[1], re.DOTALL)
    drawn = {tuple(map(float, point.split(","))) for point in chart.group(1).split()}
    probabilities = torch.softmax(logits, 1).numpy()
    bins = zip(*metrics.reliability(probabilities, labels.numpy()))
    expected = {(round(50 + 296 * c, 1), round(196 - 184 * a, 1)) for c, a, _ in bins}
    assert drawn == expected and len(drawn) > 8


def test_onnx_files_are_left_out_where_their_runtime_is_missing(
    inside, tmp_path, monkeypatch, capfd
):
    shutil.copytree("runs/student", tmp_path / "runs" / "student")
    (tmp_path / "runs" / "student" / "student.onnx").write_bytes(b"any")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    words = ("--data-dir", inside.data, *QUICK, "report")
    assert call(evaluate.main, *words) == 0
    printed = capfd.readouterr().out
    assert "left out runs/student/student.onnx: pip install onnxruntime" in printed
    names = [name.removeprefix("runs/student/") for name in read(tmp_path / "report")[2]["models"]]
    assert names == ["model.pt", "student.int8.ts", "student.ts"]
    assert call(evaluate.main, "runs/student/student.onnx", *words) == 2


def test_a_student_of_an_ensemble_that_was_built_anew_is_named(inside, tmp_path, capfd):
    shutil.copytree("runs", tmp_path / "runs")
    spec = json.loads((tmp_path / "runs" / "ensemble" / "ensemble.json").read_text())
    save_json({**spec, "weights": [1.0, 0.5]}, tmp_path / "runs" / "ensemble" / "ensemble.json")
    files = [tmp_path / "runs" / name for name in ("ensemble", "student/student.ts")]
    words = ("--data-dir", inside.data, *QUICK, tmp_path / "report")
    assert call(evaluate.main, *files, *words) == 0
    said = "student.ts: of an ensemble that is none of those measured beside it"
    assert said in capfd.readouterr().out
    assert call(evaluate.main, "runs/ensemble", files[1], *words) == 0
    assert said not in capfd.readouterr().out


def test_models_that_call_other_classes_good_are_told(inside, tmp_path, monkeypatch, capfd):
    def with_another(path, load=models.read_header):
        header = load(path)
        return {**header, "args": {**header["args"], "good_class": ["cross"]}}

    monkeypatch.setattr(models, "read_header", with_another)
    words = ("--test-dirs", "parts/test", *QUICK, tmp_path)
    assert call(evaluate.main, "runs/student/student.ts", "runs/student/model.pt", *words) == 0
    assert "other classes good; AUROC is of level" in capfd.readouterr().out


def test_an_exported_file_of_other_training_pictures_is_known_by_its_fingerprint(inside):
    first, file = map(evaluate.open_model, (Path(TEACHERS[0]), Path("runs/student/student.ts")))
    assert not evaluate.trained_on_others(file, first)
    other = replace(file, header={**file.header, "data_fingerprint": "of others"})
    assert evaluate.trained_on_others(other, first)


def test_a_baseline_alone_is_no_comparison(inside, tmp_path):
    words = ("runs/alone/model.pt", "--baseline", "runs/alone/model.pt", *QUICK, tmp_path)
    assert call(evaluate.main, *words) == 0
    assert "Nothing but the baseline runs/alone/model.pt was measured" in read(tmp_path)[0]
