"""The report people look at: whole, equal to metrics.json, safe against hostile names, and quiet in a real browser."""

import csv
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

import evaluate
from conftest import call, make_set

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page(tiny):
    return (tiny.runs / "report" / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(page):
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"url\(|@import|<script|<iframe|https?://", page)


def test_numbers_on_the_page_are_those_of_metrics_json(tiny, page):
    metrics = json.loads((tiny.runs / "report" / "metrics.json").read_text())
    rows = {row["model"]: row for row in csv.DictReader(open(tiny.runs / "report" / "metrics.csv")) if row["set"] == "test"}
    for name, model in metrics["models"].items():
        low, high = model["sets"]["test"]["accuracy_interval"]
        line = next(line for line in page.split("<tr>") if line.startswith(f"<td>{name}</td>") and "<small>" in line)
        assert f"<b>{100 * model['mean_accuracy']:.1f}</b>" in line
        assert f"{100 * model['sets']['test']['accuracy']:.1f} <small>[{100 * low:.1f} to {100 * high:.1f}]" in line
        assert float(rows[name]["accuracy"]) == model["sets"]["test"]["accuracy"]
    difference = metrics["models"]["runs/student/best.pt"]["minus_baseline"]["difference"]
    assert f"{100 * difference:+.1f} points" in page


def test_hostile_names_are_escaped_and_no_spreadsheet_formula(inside, tmp_path):
    hostile = make_set(tmp_path / "sets", {"=cmd<img src=x onerror=alert(1)>": 3})
    folder = next(hostile.iterdir())
    Image.new("RGB", (40, 40)).save(folder / "cross" / "a<script>alert(2)</script>.png".replace("/", "_"))
    assert call(evaluate.main, "runs/student/student.ts", "--test-dirs", folder, "--output", tmp_path / "out", "--device", "cpu") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "<script" not in page and "=cmd&lt;img" in page
    assert "'=cmd<img" in (tmp_path / "out" / "metrics.csv").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1200, 360])
def test_a_browser_shows_the_page_without_a_word_of_complaint(tiny, tmp_path, width):
    file = tiny.runs / "report" / "report.html"
    shot = tmp_path / "page.png"
    run = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},1600",
                          f"--user-data-dir={tmp_path}", f"--screenshot={shot}", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr
    with Image.open(shot) as image:
        low, high = image.convert("L").getextrema()
        assert high - low > 150  # something is drawn
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", file.as_uri()],
                         capture_output=True, text=True, timeout=120).stdout
    for key in ("answer", "models", "sets", "curves", "audit", "provenance"):
        assert f'id="{key}"' in dom
    assert dom.count("<table") >= 5 and dom.count("<svg") >= 4
