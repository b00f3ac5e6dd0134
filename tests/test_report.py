"""The report people look at: whole, equal to metrics.json, safe against hostile names, quiet."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import CPU, call, make_set
from PIL import Image

import evaluate
from common import report

NAMES = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)


class Rows(HTMLParser):
    """The rows of all tables as texts, cells apart."""

    def __init__(self, page):
        super().__init__()
        self.texts = []
        self.feed(page)
        self.rows = [text.split() for text in self.texts]

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.texts.append("")
        elif tag != "wbr" and self.texts:  # where a long path may be broken
            self.texts[-1] += " "

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def page(tiny):
    return (tiny.runs / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metrics(tiny):
    return json.loads((tiny.runs / "report" / "metrics.json").read_text())


def text_of(html):
    """Without tags, and with single spaces."""
    return " ".join(re.sub(r"<[^>]*>", "", html).split())


def test_the_page_needs_nothing_but_itself(page):
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"url\(|@import|<script|<iframe|https?://", page)


def test_numbers_on_the_page_are_those_of_metrics_json(page, metrics):
    rows = Rows(page).rows
    for name, model in metrics["models"].items():
        row = " ".join(next(row for row in rows if row and row[0] == name))
        low, high = model["sets"]["test"]["accuracy_interval"]
        accuracy = 100 * model["sets"]["test"]["accuracy"]
        assert f" {100 * model['mean_accuracy']:.1f} " in row
        assert f" {accuracy:.1f} [{100 * low:.1f} to {100 * high:.1f}] " in row
        assert f" {model['latency_ms']:.1f} cpu" in row


def test_the_answer_is_about_the_distilled_student_and_the_file_for_the_line(page, metrics):
    answer = text_of(re.search(r'id="answer">(.*?)</p>', page, re.DOTALL).group(1))
    student = metrics["models"]["runs/student/model.pt"]
    points = f"{100 * student['minus_baseline']['difference']:+.1f}"
    assert "runs/student/model.pt is better than the baseline runs/alone/model.pt" in answer
    assert f"{points} points in the mean over 2 test sets" in answer
    assert "The file for the line, runs/student/student.ts, misses" in answer
    assert len(answer) < 600  # one short paragraph


def test_mistakes_and_matrices_are_the_distilled_files_even_beside_the_baselines(inside, tmp_path):
    files = ("runs/alone/student.ts", "runs/alone/student.int8.ts", "runs/student/student.ts")
    words = (*files, "--baseline", "runs/alone/model.pt", "--output", tmp_path, "--skip-audit")
    assert call(evaluate.main, *words, *CPU) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    matrix = json.loads((tmp_path / "metrics.json").read_text())["models"][files[2]]
    section = re.search(r'id="sets".*?</section>', page, re.DOTALL).group()
    assert files[2] in section and "runs/alone" not in section
    rows = Rows(section).rows
    counts = matrix["sets"]["test"]["confusion_matrix"]
    for name, row in zip(("cross", "level", "upright"), counts):
        assert [name, *map(str, row)] in [found[:4] for found in rows]


def test_hostile_names_are_escaped_and_no_spreadsheet_formula(inside, tmp_path):
    hostile = make_set(tmp_path / "sets", {"=cmd<img src=x onerror=alert(1)>": 3})
    folder = next(hostile.iterdir())
    Image.new("RGB", (40, 40)).save(folder / "cross" / "a<script>alert(2)<b>.png")
    words = ("runs/student/student.ts", "--test-dirs", folder, "--output", tmp_path / "out")
    assert call(evaluate.main, *words, *CPU) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "<script" not in page and "=cmd&lt;img" in page
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        cells = {cell for row in csv.reader(file) for cell in row}
    assert any(cell.startswith("./=cmd<img") for cell in cells)
    assert not any(cell.startswith("=") for cell in cells)


def browse(folder, page, *flags):
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}")
    command = [BROWSER, *fixed, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 500])  # 500 is the narrowest that a headless window gets
def test_a_browser_shows_the_page_without_complaint_or_sideways_scrolling(tiny, tmp_path, width):
    page, shot = tiny.runs / "report" / "report.html", tmp_path / "page.png"
    logging = ("--enable-logging=stderr", f"--window-size={width},1600", f"--screenshot={shot}")
    assert "CONSOLE" not in browse(tmp_path, page, *logging).stderr
    with Image.open(shot) as image:
        low, high = image.convert("L").getextrema()
        assert high - low > 150  # something is drawn

    # A copy that writes how wide it turned out into its own title.
    probe = tmp_path / "probe.html"
    script = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    dom = browse(tmp_path, probe, f"--window-size={width},1600", "--dump-dom").stdout
    assert int(re.search(r"<title>(\d+)</title>", dom).group(1)) <= width
    for key in ("answer", "models", "sets", "curves", "audit", "provenance"):
        assert f'id="{key}"' in dom
    assert dom.count("<table") >= 5 and dom.count("<svg") >= 4


def test_validation_that_does_not_tell_stands_in_the_answer(inside, tmp_path, capfd):
    swapped = tmp_path / "test_swapped"  # every picture in another class's folder
    for name, other in (("cross", "level"), ("level", "upright"), ("upright", "cross")):
        shutil.copytree(f"parts/test/{name}", swapped / other)
    words = ("--test-dirs", "parts/test", swapped, "--output", tmp_path / "out", "--skip-audit")
    assert call(evaluate.main, "runs/student/model.pt", *words, *CPU) == 0
    said = capfd.readouterr().out
    assert "validation does not tell about test_swapped: 1 of 1 models" in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    answer = text_of(re.search(r'id="answer">(.*?)</p>', page, re.DOTALL).group(1))
    assert "Validation does not tell about test_swapped: 1 of 1 models" in answer
    assert "about test:" not in answer


def test_val_and_test_differ_only_beyond_both_intervals():
    def model(right, n, balanced):
        return {"validation": {"accuracy": right / n, "balanced_accuracy": balanced, "n": n},
                "sets": {"test": {"accuracy": 0.85, "balanced_accuracy": 0.85, "n": 407}}}
    easy = model(183, 187, 0.98)  # from 0.946; 0.85 of 407 is up to 0.881
    few = model(20, 20, 1.0)  # from 0.839
    other_shares = model(480, 500, 0.85)  # many good parts, as well recalled as those of test
    (found,) = report.untold_by_validation({"a": few, "b": easy, "c": other_shares})
    assert (found["differ"], found["models"], found["model"]) == (1, 3, "b")
    assert report.untold_by_validation({"a": few}) == []


def test_with_many_classes_a_list_of_the_worst_takes_the_matrix_s_place():
    few, many = 30, 300
    assert report.worst_classes(np.eye(few, dtype=int).tolist()) == []
    matrix = 9 * np.eye(many, dtype=int)
    matrix[7, [7, 8, 9, 10, 11]] = 1, 4, 3, 2, 1
    matrix[5] = 0  # no pictures of it
    rows = report.worst_classes(matrix.tolist())
    assert len(rows) == report.MANY and 5 not in [row["number"] for row in rows]
    assert rows[0] == {"number": 7, "n": 11, "right": 1, "taken_for": [(8, 4), (9, 3), (10, 2)]}


def test_copies_with_other_labels_come_first_then_those_in_test_sets():
    copies = [{"set": of, "labels": labels} for of, labels in (
        ("val", [0, 0]), ("test", [1, 1]), ("unlabelled", [0, -1]), ("val", [0, 1]))]
    order = [copies.index(copy) for copy in report.worst_first(copies)]
    assert order == [3, 1, 0, 2]


@pytest.mark.parametrize("counts, shortcut, best, told", [
    ([0, 20], 1.0, 0.97, 0),  # one class alone tells nothing
    ([20, 20], 1.0, 0.97, 1),
    ([20, 20], 0.56, 0.5, 0),  # a weak model is no sign of a shortcut
    ([20, 20], 0.5, 0.48, 0),
])
def test_a_shortcut_is_told_that_is_strong_and_near_the_best_model(counts, shortcut, best, told):
    summary = {
        "classes": ["bad", "good"],
        "models": {"m": {"sets": {"test": {"balanced_accuracy": best}}}},
        "audit": {"shortcuts": {"thumbnail": {"test": {"balanced_accuracy": shortcut}}},
                  "per_class": {"test": counts}},
    }
    assert len(report.shortcut_warnings(summary)) == told
