"""infer.py on a device: what it prints, refuses, watches and survives."""

import ast
import csv
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import infer
from common.export import load_exported
from common.files import UserError, checksummed


@pytest.fixture(scope="module")
def edge(tiny):
    """The run folder of the tiny chain's student, whose good class is `level`."""
    return tiny.runs / "student"


def run_infer(*words, **more):
    command = [sys.executable, str(ROOT / "infer.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **more)


@pytest.fixture
def infer_here(monkeypatch, capsys):
    """As `run_infer`, within this process: a process of its own takes 2 s to import torch."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["infer.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            infer.main()
        return subprocess.CompletedProcess(words, end.value.code, *capsys.readouterr())

    return run


def in_one_line(run):
    """What the only line on stderr of a refused run says."""
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_infer_runs_alone_and_reports_bad_pictures(edge, tiny, tmp_path):
    shutil.copy(ROOT / "infer.py", tmp_path)
    shutil.copy(edge / "student.ts", tmp_path)
    shutil.copytree(tiny.data / "test" / "level", tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no")
    (tmp_path / "block.py").write_text(
        "import runpy, sys\n"
        "for name in ('common', 'timm', 'torchvision', 'tqdm', 'pytest', 'safetensors'):\n"
        "    sys.modules[name] = None  # importing it fails\n"
        "sys.argv = ['infer.py', '--model', 'student.ts', *sys.argv[1:]]\n"
        "runpy.run_path('infer.py', run_name='__main__')\n"
    )

    def run(*words):
        command = [sys.executable, "block.py", *words, "pictures"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    plain, as_json = run(), run("--json")
    assert plain.returncode == as_json.returncode == 1
    assert "broken.png: cannot be read" in plain.stderr
    rows, objects = plain.stdout.splitlines(), map(json.loads, as_json.stdout.splitlines())
    verdicts = [each for each in objects if "error" not in each]
    assert len(rows) == 20
    for row, verdict in zip(rows, verdicts, strict=True):
        path, name, probability, decision = row.split("\t")
        assert (path, name) == (verdict["path"], verdict["class"])
        assert decision == verdict["decision"]
        p = verdict["probabilities"]
        assert p[name] == max(p.values()) == verdict["probability"]
        assert float(probability) == pytest.approx(verdict["probability"], abs=1e-3)


def test_infer_decides_by_the_threshold_and_reviews_in_the_band(edge, tiny, infer_here):
    folder, file = tiny.data / "test", edge / "student.ts"
    threshold = load_exported(file)[1]["operating_point"]["threshold"]
    plain = infer_here("--model", file, "--json", folder).stdout.splitlines()
    scores = []
    for verdict in map(json.loads, plain):
        scores.append(verdict["defect_score"])
        assert verdict["decision"] == ("REJECT" if scores[-1] >= threshold else "PASS")
    assert len(scores) == 60
    low, high = sorted(scores)[20], sorted(scores)[40]
    words = ("--model", file, "--csv", "--review-band", low, high, folder)
    banded = infer_here(*words).stdout.splitlines()
    assert banded[0] == "path,decision,class,probability,defect_score"
    for score, line in zip(scores, banded[1:], strict=True):
        expected = "REJECT" if score >= high else "REVIEW" if score >= low else "PASS"
        assert line.split(",")[1] == expected
    info = json.loads(run_infer("--model", edge / "student.int8.ts", "--info").stdout)
    assert info["precision"] == "int8" and info["classes"] == ["cross", "level", "upright"]


def test_every_picture_that_does_not_pass_gets_a_heatmap_of_its_own(edge, tiny, tmp_path):
    for name in ("line_1", "line_2"):  # equal file names in two folders
        shutil.copytree(tiny.data / "test_other", tmp_path / name)
    words = ("--heatmap", "maps", "--json", "line_1", "line_2")
    run = run_infer("--model", edge / "student.ts", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    verdicts = list(map(json.loads, run.stdout.splitlines()))
    rejected = {v["path"] for v in verdicts if v["decision"] == "REJECT"}
    drawn = [v["heatmap"] for v in verdicts if "heatmap" in v]
    assert len(verdicts) == 72 and len(rejected) > 42
    assert len(set(drawn)) == len(drawn) == len(rejected)
    assert {path.name for path in (tmp_path / "maps").iterdir()} == set(drawn)


def test_paths_that_differ_in_anything_get_heatmaps_of_their_own(edge, tiny, tmp_path, monkeypatch):
    source = sorted((tiny.data / "test" / "cross").iterdir())[0]
    here = tmp_path / "here"
    inside = here / tmp_path.relative_to("/")  # a relative path as the absolute one
    for folder in (tmp_path, here / "up", inside):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / "a.png")
    monkeypatch.chdir(here)
    student, metadata = infer.load_student(edge / "student.ts")
    judge = infer.Judge(student, metadata, (0, 1), here / "maps")
    paths = [tmp_path / "a.png", Path(inside.relative_to(here), "a.png"), Path("../a.png"),
             Path("up/a.png")]
    maps = {judge(path)["heatmap"] for path in paths}
    assert len(maps) == 4
    Image.open(source).transpose(Image.ROTATE_180).save(tmp_path / "a.png")
    assert judge(tmp_path / "a.png")["heatmap"] not in maps  # a camera uses its name again


def test_a_link_to_nothing_is_counted(tmp_path, capsys):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert not list(infer.list_pictures([str(tmp_path)]))
    assert "1 link to nothing" in capsys.readouterr().err


def test_pictures_of_cameras_of_any_shape_go_through_infer(edge, tmp_path):
    Image.new("RGBA", (333, 77)).save(tmp_path / "wide.png")
    Image.new("L", (5, 400)).save(tmp_path / "tall.png")
    run = run_infer("--model", edge / "student.ts", tmp_path)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 2


def test_a_score_that_is_no_number_is_rejected_and_a_tiny_one_is_not_lost():
    metadata = {"view_size": [2, 2], "white_level": 65535, "classes": ["bad", "good"],
                "good_classes": ["good"], "operating_point": {"threshold": 0.5}}
    frame = np.zeros((2, 2, 3), np.uint8)

    def verdict(*p, band=None):
        student = lambda pictures: np.array([p], np.float32)  # noqa: E731
        return infer.Judge(student, metadata, band)(Path("x"), frame)

    for band in (None, (0.2, 0.9)):
        assert verdict(np.nan, np.nan, band=band)["decision"] == "REJECT"
    assert verdict(3e-9, 1.0)["defect_score"] == pytest.approx(3e-9)  # 1 - p(good) is 0


def test_the_int8_engine_is_the_first_of_a_fixed_order_that_works(monkeypatch):
    before, tried = torch.backends.quantized.engine, []

    def load():
        tried.append(torch.backends.quantized.engine)
        if len(tried) == 1:
            raise RuntimeError("this engine cannot pack it")
        return lambda frame: None

    try:
        _, engine = infer.first_working_engine(load, None)
    finally:
        torch.backends.quantized.engine = before
    supported = torch.backends.quantized.supported_engines
    assert tried == [name for name in infer.ENGINES if name in supported][:2]
    assert engine == tried[1]


def test_a_pattern_that_matches_only_folders_means_what_is_in_them(tmp_path):
    for name in ("one/a.png", "two/b.png", "two/.c.png", "two/.d/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = list(infer.list_pictures([f"{tmp_path}/*"]))
    assert paths == [tmp_path / "one" / "a.png", tmp_path / "two" / "b.png"]
    assert list(infer.list_pictures([f"{tmp_path}/**"])) == paths
    (tmp_path / "stray.png").touch()  # beside folders, each picture once
    for pattern in ("*", "**"):
        found = list(infer.list_pictures([f"{tmp_path}/{pattern}"]))
        assert found == [*paths[:1], tmp_path / "stray.png", *paths[1:]]


def test_names_forge_no_line_and_drive_no_terminal_and_lead_back_to_the_file(
    edge, tmp_path, monkeypatch, infer_here
):
    names = [b"a\nb.png\tgood\t1.000\tPASS\nc.png", b"\x1b[31mred.png", b"\xff\xfe.png",
             "\u202egnp.\u00e9 \u4e2d.png".encode(), b"back\\slash.png",
             b"=1+1.png", b"@x.png", b"-1.png"]
    for name in names:
        Image.new("L", (40, 40)).save(os.fsencode(tmp_path) + b"/" + name)
    words = ("--model", edge / "student.ts", ".")
    monkeypatch.chdir(tmp_path)
    plain = run_infer(*words)
    as_csv, as_json = (infer_here(*words, form) for form in ("--csv", "--json"))
    rows = [row.split("\t") for row in plain.stdout.splitlines()]
    records = list(csv.reader(as_csv.stdout.splitlines()))[1:]
    verdicts = [json.loads(line) for line in as_json.stdout.splitlines()]
    for run in (plain, as_csv, as_json):
        assert run.returncode == 0
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\ufffd]", run.stdout)

    def bytes_of(path):
        return os.path.normpath(os.fsencode(ast.literal_eval(f'"{path}"')))

    assert all(len(row) == 4 for row in rows) and all(len(record) == 5 for record in records)
    for paths in ([r[0] for r in rows], [r[0] for r in records], [v["path"] for v in verdicts]):
        assert sorted(map(bytes_of, paths)) == sorted(names)
    assert {"./=1+1.png", "./@x.png", "./-1.png"} <= {record[0] for record in records}
    assert not any(record[0][0] in "=+-@" for record in records)


def test_a_pipe_among_the_pictures_is_not_waited_for(edge, tmp_path):
    os.mkfifo(tmp_path / "x.png")
    Image.new("L", (40, 40)).save(tmp_path / "y.png")
    run = run_infer("--model", edge / "student.ts", tmp_path, f"{tmp_path}/*.png", timeout=60)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 2
    run = run_infer("--model", edge / "student.ts", tmp_path / "x.png", timeout=60)
    assert "no pictures" in in_one_line(run)


def test_heatmaps_are_not_written_among_the_pictures(
    edge, tiny, tmp_path, infer_here, monkeypatch
):
    shutil.copytree(tiny.data / "test" / "cross", tmp_path / "shots")
    monkeypatch.chdir(tmp_path)
    words = ("--model", edge / "student.ts", "shots/*.png", "--heatmap", "shots")
    assert "among the pictures" in in_one_line(infer_here(*words))
    assert not list(tmp_path.rglob("*.jpg"))


def test_a_full_disk_ends_it_in_one_line(edge, tiny):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "infer.py", "--model", edge / "student.ts", tiny.data]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "No space left on device" in in_one_line(run)


# ------------------------------------------------------------------------------------------- watch


def start_watch(edge, folder, *words, **more):
    words = ["--model", edge / "student.ts", "--watch", folder, "--json", *words]
    command = [sys.executable, "-u", ROOT / "infer.py", *words]
    return subprocess.Popen(command, text=True, **{
        "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **more
    })


def judged(folder):
    """The whole lines of a folder's judged.jsonl as data."""
    file = folder / "judged.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def names_judged(folder):
    return [record["key"][0] for record in judged(folder)]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def stop(process):
    process.kill()
    process.wait()


@pytest.fixture
def shots(tiny, tmp_path):
    """A folder with five pictures of defects."""
    (tmp_path / "shots").mkdir()
    for file in sorted((tiny.data / "test" / "cross").iterdir())[:5]:
        shutil.copy(file, tmp_path / "shots")
    return tmp_path / "shots"


def test_a_watched_folder_is_judged_once_and_whole_across_a_kill(edge, tiny, tmp_path):
    files = sorted((tiny.data / "test").rglob("*.png"))[:12]
    source = [file.read_bytes() for file in files]
    first = start_watch(edge, tmp_path)
    for number, content in enumerate(source[:5]):
        (tmp_path / f"{number:02d}.png").write_bytes(content)
    half = open(tmp_path / "half.png", "wb")
    half.write(source[5][:200])
    half.flush()

    def five_are_judged():
        os.utime(tmp_path / "half.png")  # just changed, however slow this machine is
        return len(names_judged(tmp_path)) == 5

    wait_until(five_are_judged)
    stop(first)

    for number, content in enumerate(source[6:9], 6):
        (tmp_path / f"{number:02d}.png").write_bytes(content)
    with open(tmp_path / "judged.jsonl", "a") as file:
        file.write('{"key": ["06.png", 1')  # a write that the kill cut off
    second = start_watch(edge, tmp_path)
    half.write(source[5][200:])
    half.close()
    wait_until(lambda: len(names_judged(tmp_path)) == 9)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    wait_until(lambda: len(names_judged(tmp_path)) == 10)
    stop(second)
    names = names_judged(tmp_path)
    expected = [f"{n:02d}.png" for n in (0, 1, 2, 3, 4, 6, 7, 8)] + ["half.png", "broken.png"]
    assert sorted(names) == sorted(expected) and names[-1] == "broken.png"
    lines = (tmp_path / "judged.jsonl").read_text().splitlines()
    *whole, bad = [json.loads(line) for line in lines]
    assert "error" in bad and all("decision" in line for line in whole)


def test_a_file_whose_size_is_final_before_its_pixels_is_judged_at_rest(monkeypatch, tmp_path):
    """A preallocated BMP is readable all the while; only its time of change tells that it grows."""
    def write(second):
        (tmp_path / "x.bmp").write_bytes(bytes(100))
        os.utime(tmp_path / "x.bmp", (second, second))

    steps = iter([lambda: write(1), lambda: write(2), lambda: None, lambda: write(3)])
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        next(steps, lambda: None)()

    write(0)
    monkeypatch.setattr(infer.time, "sleep", sleep)
    judged = set()
    arriving = infer.arrivals(tmp_path, judged)
    _, first = next(arriving)
    judged.add(first)
    _, second = next(arriving)
    assert (first[2], second[2]) == (2 * 10**9, 3 * 10**9)


def test_looking_at_thousands_of_judged_pictures_takes_little_of_a_core(monkeypatch, tmp_path):
    for number in range(5000):
        (tmp_path / f"{number}.png").touch()
    judged = {(path.name, *infer.stamp(path)) for path in tmp_path.iterdir()}
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(infer.time, "sleep", sleep)
    start = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        next(infer.arrivals(tmp_path, judged))
    assert (time.process_time() - start) < 0.08 * sum(slept)


def test_a_damaged_line_costs_no_more_than_its_own_picture(edge, shots):
    watcher = start_watch(edge, shots)
    wait_until(lambda: len(names_judged(shots)) == 5)
    stop(watcher)
    lines = (shots / "judged.jsonl").read_bytes().splitlines(keepends=True)
    names = names_judged(shots)
    lines[1] = lines[1][:20] + lines[2]  # a full disk cut the second short
    lines[2] = b"\0" * 50 + b"\n"
    lines[3] = b"[" * 100_000 + b"\n"
    (shots / "judged.jsonl").write_bytes(b"".join(lines))
    watcher = start_watch(edge, shots, stderr=subprocess.PIPE)
    assert "3 judged before" in watcher.stderr.readline()
    again = [json.loads(watcher.stdout.readline())["path"] for _ in range(2)]
    stop(watcher)
    assert sorted(again) == sorted(str(shots / name) for name in (names[1], names[3]))


def test_odd_pictures_do_not_end_the_watch(edge, tmp_path):
    folder = tmp_path / "shots"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    Image.new("L", (3, 60_000)).save(folder / "tall.png")
    Image.new("L", (60_000, 1)).save(folder / "wide.png")
    Image.new("L", (70_000, 1)).save(folder / "wider.png")
    Image.new("L", (9, 9)).save(folder / f"{'n' * 246}.png")
    (folder / "x\ny.png").write_bytes(b"no picture")
    words = ("--heatmap", tmp_path / "maps", "--review-band", 0, 1)
    watcher = start_watch(edge, folder, *map(str, words))
    wait_until(lambda: len(names_judged(folder)) == 5)
    stop(watcher)
    unread = {record["key"][0] for record in judged(folder) if "error" in record}
    assert unread == {"wider.png", "x\ny.png"}
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_a_second_watcher_is_refused_in_one_line(edge, shots):
    first = start_watch(edge, shots)
    wait_until(lambda: len(names_judged(shots)) == 5)
    run = run_infer("--model", edge / "student.ts", "--watch", shots, timeout=60)
    assert "watched by another" in in_one_line(run) and first.poll() is None
    stop(first)  # a killed one holds nothing
    third = start_watch(edge, shots, stderr=subprocess.PIPE)
    assert "5 judged before" in third.stderr.readline()
    stop(third)


def test_watch_without_filelock_says_what_to_install(edge, shots, monkeypatch, infer_here):
    monkeypatch.setitem(sys.modules, "filelock", None)
    run = infer_here("--model", edge / "student.ts", "--watch", shots)
    assert in_one_line(run) == "error: --watch needs filelock; pip install filelock\n"


def test_a_picture_counts_as_judged_when_its_heatmap_is_drawn(edge, shots, tmp_path):
    (tmp_path / "maps").write_text("a file where the folder should be")
    words = ("--heatmap", str(tmp_path / "maps"), "--review-band", "0", "1")
    watcher = start_watch(edge, shots, *words, stderr=subprocess.PIPE)
    assert watcher.wait(60) == 2 and "maps" in watcher.stderr.read() and not judged(shots)
    (tmp_path / "maps").unlink()
    watcher = start_watch(edge, shots, *words)
    wait_until(lambda: len(names_judged(shots)) == 5)
    stop(watcher)
    assert len(list((tmp_path / "maps").rglob("*.jpg"))) == 5


def test_after_a_full_disk_the_watch_goes_on_with_nothing_lost_or_doubled(edge, shots):
    resource = pytest.importorskip("resource")

    def fill_soon():  # a file may grow to 900 bytes: three lines and a part of the fourth
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))

    watcher = start_watch(edge, shots, stderr=subprocess.PIPE, preexec_fn=fill_soon)
    first, errors = watcher.communicate(timeout=60)
    assert watcher.returncode == 2 and errors.count("error:") == errors.count("\n") - 1 == 1
    written = (shots / "judged.jsonl").read_bytes()
    assert written.endswith(b"\n") and 0 < len(judged(shots)) == first.count("\n") < 5
    watcher = start_watch(edge, shots)
    wait_until(lambda: len(names_judged(shots)) == 5)
    then = [watcher.stdout.readline() for _ in range(5 - first.count("\n"))]
    stop(watcher)
    said = [json.loads(line)["path"] for line in [*first.splitlines(), *then]]
    assert sorted(said) == sorted(str(path) for path in shots.glob("*.png"))
    assert sorted(names_judged(shots)) == sorted(path.name for path in shots.glob("*.png"))


def test_a_verdict_that_could_not_be_printed_is_printed_after_the_next_start(edge, shots):
    with open("/dev/full", "w") as full:
        watcher = start_watch(edge, shots, stdout=full)
        assert watcher.wait(60) == 2
    assert not judged(shots)


def test_watch_goes_down_into_folders_and_leaves_out_what_systems_leave(edge, tiny, tmp_path):
    source = sorted((tiny.data / "test" / "cross").iterdir())[0]
    for name in ("2026-11-29/a.png", "2026-11-29/@eaDir/a.png", "b.png", ".tmp/c.png", "d.heic"):
        (tmp_path / "shots" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "shots" / name)
    watcher = start_watch(edge, tmp_path / "shots", stderr=subprocess.PIPE)
    wait_until(lambda: len(names_judged(tmp_path / "shots")) == 2)
    (tmp_path / "shots" / "2026-11-30").mkdir()
    shutil.copy(source, tmp_path / "shots" / "2026-11-30" / "a.png")
    wait_until(lambda: len(names_judged(tmp_path / "shots")) == 3)
    stop(watcher)
    names = sorted(names_judged(tmp_path / "shots"))
    assert names == ["2026-11-29/a.png", "2026-11-30/a.png", "b.png"]
    said = watcher.stderr.read()
    assert said.count("left out") == 1 and "1 .heic" in said and "1 folder @eaDir" in said


def test_a_passing_error_is_told_once_tried_again_and_not_recorded(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    answers = iter([{"path": "a.png", "error": "Input/output error", "passing": True}] * 3
                   + [{"path": "a.png", "class": "level"}])
    told = []

    def sleep(_):
        if len(told) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(infer.time, "sleep", sleep)
    monkeypatch.setattr(infer, "AGAIN", 0)
    monkeypatch.setattr(infer, "SETTLE", 0)
    with pytest.raises(KeyboardInterrupt):
        infer.watch(tmp_path, lambda path, ready: next(answers), told.append, [])
    assert ["error" in verdict for verdict in told] == [True, False]
    assert ["error" in verdict for verdict in judged(tmp_path)] == [False]


def test_a_folder_that_cannot_be_searched_for_a_moment_is_searched_again(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.png").write_bytes(b"x")
    scan, looks = os.scandir, []

    def fail_twice(folder):
        looks.append(folder)
        if len(looks) < 3:
            raise OSError(5, "Input/output error", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", fail_twice)
    path, _ = next(infer.arrivals(tmp_path, set()))
    assert path == tmp_path / "a.png"
    assert capsys.readouterr().err.count("Input/output error; looking again") == 1


def watched(folder, judge, monkeypatch, enough):
    """What infer.watch reports of a folder until `enough` pictures are told, and what was said."""
    told, rest, end = [], time.sleep, time.monotonic() + 20

    def sleep(_):
        rest(0.01)
        if len(told) >= enough or time.monotonic() > end:
            raise KeyboardInterrupt

    monkeypatch.setattr(infer.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        infer.watch(folder, judge, told.append, [])
    return told


def test_a_folder_that_may_not_be_searched_stops_nothing_around_it(
    tmp_path, monkeypatch, capsys
):
    for name in ("locked/a.png", "open/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    told = watched(tmp_path, lambda path, ready: {"path": path.name}, monkeypatch, 1)
    assert [verdict["path"] for verdict in told] == ["b.png"]
    assert "1 folder locked (Permission denied)" in capsys.readouterr().err


def test_a_picture_that_is_taken_away_while_it_is_judged_keeps_its_verdict(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def judge(path, ready):
        path.unlink()
        return {"path": path.name, "class": "level"}

    (verdict,) = watched(tmp_path, judge, monkeypatch, 1)
    assert verdict["class"] == "level" and names_judged(tmp_path) == ["a.png"]


def test_a_picture_that_another_replaces_while_it_is_judged_keeps_its_verdict(
    tmp_path, monkeypatch
):
    (tmp_path / "latest.png").write_bytes(b"first")
    shown = iter([b"the second"])

    def judge(path, ready):
        content = path.read_bytes()
        assert ready(content)
        path.write_bytes(next(shown, content))  # meanwhile
        return {"path": path.name, "class": content.decode()}

    told = watched(tmp_path, judge, monkeypatch, 2)
    assert [verdict["class"] for verdict in told] == ["first", "the second"]


def test_a_file_that_ends_in_zeros_may_still_grow_and_is_judged_a_while_later(
    tmp_path, monkeypatch
):
    for name, content in (("room.bmp", b"x" + bytes(infer.TAIL)), ("whole.bmp", b"x")):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(infer, "SETTLE", 0.2)
    began, waited = time.monotonic(), {}

    def judge(path, ready):
        if ready(path.read_bytes()):
            waited[path.name] = time.monotonic() - began
            return {"path": path.name}

    assert len(watched(tmp_path, judge, monkeypatch, 2)) == 2
    assert waited["room.bmp"] >= 0.2 > waited["whole.bmp"]


def test_classes_may_be_called_key(tmp_path):
    row = {"key": ["a.png", 1, 2], "probabilities": {"key": 0.9, "nut": 0.1}}
    with open(tmp_path / "judged.jsonl", "ab", buffering=0) as log:
        infer.append(log, row)
        assert infer.judged_before(log) == ({("a.png", 1, 2)}, None)


def test_the_record_says_which_model_and_threshold_judged(edge, shots):
    file = edge / "student.ts"
    judge = infer.Judge(*infer.load_student(file))
    assert judge.rule[0] == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert judge.rule[1:] == list(judge.band)

    def line_of(*words):
        watcher = start_watch(edge, shots, *words, stderr=subprocess.PIPE)
        said = watcher.stderr.readline()
        wait_until(lambda: len(names_judged(shots)) == 5)
        stop(watcher)
        return said

    assert "0 judged before\n" in line_of() and "5 judged before\n" in line_of()
    assert [record["rule"] for record in judged(shots)] == 5 * [judge.rule]
    other = line_of("--review-band", "0.2", "0.7")
    assert "5 judged before, the last by another model or band\n" in other


def test_a_watch_whose_record_is_taken_away_ends(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def judge(path, ready):
        (tmp_path / "judged.jsonl").unlink()
        return {"path": path.name}

    with pytest.raises(infer.Refused, match="moved, removed or changed"):
        infer.watch(tmp_path, judge, None, [])


def test_a_watch_that_nobody_listens_to_ends_with_status_2(edge, shots):
    watcher = start_watch(edge, shots, stderr=subprocess.PIPE)
    watcher.stdout.close()
    assert watcher.wait(60) == 2 and "nobody reads it" in watcher.stderr.read()
    assert not judged(shots)


def test_a_picture_that_cannot_be_read_is_in_the_output_of_json_and_csv(
    edge, tmp_path, infer_here
):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    words = "--model", edge / "student.ts", tmp_path / "bad.png"
    row = json.loads(infer_here(*words, "--json").stdout)
    assert row["path"].endswith("bad.png") and "error" in row
    header, line = infer_here(*words, "--csv").stdout.splitlines()
    assert line.endswith("bad.png,,,,") and header.count(",") == line.count(",")


def test_a_log_of_csv_that_is_appended_to_has_one_header(edge, tmp_path, infer_here):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    log = tmp_path / "log.csv"
    words = [sys.executable, ROOT / "infer.py", "--model", edge / "student.ts", "--csv"]
    for _ in range(2):
        with open(log, "a") as file:
            subprocess.run([*words, tmp_path / "bad.png"], stdout=file, stderr=subprocess.DEVNULL)
    assert log.read_text().count(",".join(infer.FIELDS)) == 1
    assert log.read_text().count("bad.png") == 2


def test_a_writer_that_holds_its_picture_for_a_moment_makes_no_row(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    answers = iter([{"path": "a.png", "error": "held", "passing": True}] * 3
                   + [{"path": "a.png", "class": "level"}])
    monkeypatch.setattr(infer, "AGAIN", 10)
    told = watched(tmp_path, lambda path, ready: next(answers), monkeypatch, 1)
    assert told == [{"path": "a.png", "class": "level"}]


def test_a_picture_without_contrast_is_noted(edge, tmp_path, infer_here):
    Image.new("RGB", (96, 96), (3, 3, 3)).save(tmp_path / "dark.png")
    run = infer_here("--model", edge / "student.ts", tmp_path / "dark.png")
    assert "lamp, lens or exposure" in run.stderr and run.returncode == 0


def test_an_unreadable_picture_is_reported_whatever_the_clock_of_its_disk_says(
    tmp_path, monkeypatch
):
    (tmp_path / "a.png").write_bytes(b"x")
    ahead = time.time() + 7200
    os.utime(tmp_path / "a.png", (ahead, ahead))
    monkeypatch.setattr(infer, "SETTLE", 0.2)
    broken = {"path": "a.png", "error": "damaged", "passing": False}
    assert watched(tmp_path, lambda path, ready: broken, monkeypatch, 1) == [broken]


def test_pictures_of_another_bit_depth_than_the_model_s_are_told(tmp_path):
    metadata = {"view_size": [4, 4], "white_level": 4095, "classes": ["a", "b"],
                "good_classes": [], "operating_point": None}
    judge = infer.Judge(lambda pictures: np.array([[0.1, 0.9]], np.float32), metadata)
    notes = []
    for value in (200, 300, 4095, 20_000):
        pixels = np.linspace(0, value, 16).astype(np.uint16).reshape(4, 4)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        notes.append(judge(tmp_path / "a.png")["note"])
    assert notes == ["brightest value 200, white level 4095: nearly black", None, None,
                     "brightest value 20000, white level 4095: clipped"]


@pytest.mark.parametrize("colour", [(60, 60, 60), (40, 60, 80)])
def test_a_picture_of_one_colour_is_noted_whatever_the_colour(tmp_path, colour):
    metadata = {"view_size": [4, 4], "white_level": 65535, "classes": ["a", "b"],
                "good_classes": [], "operating_point": None}
    judge = infer.Judge(lambda pictures: np.array([[0.1, 0.9]], np.float32), metadata)
    image = Image.new("RGB", (4, 4), colour)
    image.save(tmp_path / "a.png")
    assert judge(tmp_path / "a.png")["note"] == "all of it is alike: lamp, lens or exposure"
    image.putpixel((1, 1), (200, 60, 80))
    image.save(tmp_path / "a.png")
    assert judge(tmp_path / "a.png")["note"] is None


def test_what_is_around_a_picture_is_not_taken_for_the_picture(tmp_path, monkeypatch):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    metadata = {"view_size": [4, 4], "white_level": 65535, "classes": ["a", "b"],
                "good_classes": [], "operating_point": None}
    judge = infer.Judge(lambda pictures: np.array([[0.1, 0.9]], np.float32), metadata)
    assert judge(tmp_path / "b.png")["passing"] is False
    assert judge(tmp_path / "gone.png")["passing"] is True

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(infer, "decode", out_of_memory)
    assert judge(tmp_path / "a.png")["passing"] is True


def test_benchmark_measures_the_device_with_the_threads_asked_for(edge, infer_here, monkeypatch):
    monkeypatch.setattr(infer, "repeat", lambda f, number, repeat: [f() and 0.002] * repeat)
    before = torch.get_num_threads()
    try:
        run = infer_here("--model", edge / "student.ts", "--benchmark", "--threads", before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert run.returncode == 0 and f"{before + 1} threads" in run.stdout
    assert "640 x 480 frame to decision: p50 2.00 ms, p95 2.00 ms" in run.stdout


def test_an_interrupted_run_ends_with_130(edge, infer_here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "load_student", interrupted)
    assert infer_here("--model", edge / "student.ts", "a.png").returncode == 130


def test_a_library_that_reads_no_picture_ends_it_before_any_is_judged(
    edge, tiny, monkeypatch, infer_here
):
    def too_old(*_):
        raise TypeError("exif_transpose() got an unexpected keyword argument 'in_place'")

    monkeypatch.setattr(infer, "decode", too_old)
    said = in_one_line(infer_here("--model", edge / "student.ts", tiny.data / "test"))
    assert "Pillow" in said and "reads no picture here (exif_transpose()" in said
    assert "the oldest that works is" in said


def test_of_several_pages_a_line_says_which_is_judged(edge, tmp_path, infer_here):
    page = Image.new("L", (40, 40))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    run = infer_here("--model", edge / "student.ts", tmp_path)
    assert run.returncode == 0 and "a.tif: the first of several pages is judged" in run.stderr


def test_heatmaps_inside_a_searched_or_watched_folder_are_refused(tiny, infer_here):
    words = ("--model", "none.ts", "--heatmap", tiny.data / "maps")
    for searched in ((tiny.data,), ("--watch", tiny.data)):
        assert "among the pictures" in in_one_line(infer_here(*words, *searched))


def test_a_review_band_is_two_probabilities_in_order(infer_here):
    said = infer_here("--review-band", 0.9, 0.2, "x.png")
    assert said.returncode == 2 and "0 <= LOW <= HIGH <= 1" in said.stderr


# --------------------------------------------------------------------------- the file of the model


@pytest.mark.parametrize("damage", ["foreign", "cut", "one bit of a weight"])
def test_a_foreign_truncated_or_damaged_model_is_refused_in_one_line(
    edge, tmp_path, infer_here, damage
):
    file = tmp_path / "student.ts"
    content = bytearray((edge / "student.ts").read_bytes())
    if damage == "foreign":
        torch.save({"a": 1}, file)
    elif damage == "cut":
        file.write_bytes(content[:100_000])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert "export it again" in in_one_line(infer_here("--model", file, ROOT))
    with pytest.raises(UserError, match="export it"):
        load_exported(file)


def test_a_whole_model_that_the_runtime_cannot_run_says_which_runtime(edge, monkeypatch):
    def too_old(*_, **__):
        raise RuntimeError("Unknown builtin op: aten::new\nmore lines")

    monkeypatch.setattr(torch.jit, "load", too_old)
    said = refusal(edge / "student.ts")
    assert f"is whole, but torch {torch.__version__.split('+')[0]}" in said
    assert "Unknown builtin op" in said and "oldest that works" in said


def refusal(file, *more):
    """What infer.py's loading says of a file that it refuses, in one line."""
    with pytest.raises(infer.Refused) as refused:
        infer.load_student(file, *more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class Foreign(torch.nn.Module):
    """TorchScript that answers like a student of three classes."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3), 1 / 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [
    {}, {"schema": 1}, {"classes": ["a", "b"]}, {"classes": 3}, {"classes": [1, 2, 3]},
    {"good_classes": ["none"]}, {"good_classes": "level"}, {"view_size": "64"}, {"view_size": 64},
    {"view_size": [10**9] * 2}, {"view_size": [64]},
    {"white_level": None}, {"white_level": 0}, {"precision": []}, {"operating_point": [1]},
    {"operating_point": {"threshold": "0.5"}}, {"good_classes": None},
    "[]", "{}", "null", "no JSON", "[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900, None,
], ids=lambda change: str(change)[:40])
def test_torchscript_with_other_metadata_is_refused_in_one_line(edge, tmp_path, change):
    metadata = load_exported(edge / "student.ts")[1]
    text = json.dumps({**metadata, **change}) if isinstance(change, dict) else change
    extra = {} if text is None else {"metadata.json": text}
    with checksummed(tmp_path / "x.ts") as file:
        torch.jit.save(torch.jit.script(Foreign()), file, _extra_files=extra)
    if change == {}:
        assert metadata.items() <= infer.load_student(tmp_path / "x.ts")[1].items()
    else:
        assert "not a student.ts" in refusal(tmp_path / "x.ts")


def test_every_cut_and_flipped_bit_of_a_model_is_refused_or_harmless(edge, tmp_path):
    whole = (edge / "student.int8.ts").read_bytes()
    metadata = load_exported(edge / "student.int8.ts")[1]
    file, chance, refused = tmp_path / "x.ts", random.Random(0), 0
    for number in range(40):
        data = bytearray(whole)
        if number < 4:
            del data[[0, 1, 1000, len(whole) - 1][number]:]
        else:  # most of a file is weights: half of the flips are in the directory at its end
            start = max(0, len(data) - 20_000) if number % 2 else 0
            data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            assert metadata.items() <= infer.load_student(file)[1].items()
        except infer.Refused as error:
            assert "export it again" in str(error)
            refused += 1
    assert refused > 20


def test_only_the_model_of_the_named_sha256_is_loaded(edge, infer_here, monkeypatch):
    file = edge / "student.ts"
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert infer.load_student(file, right.upper())[1]["precision"] == "float32"
    said = refusal(edge / "student.int8.ts", right)
    assert right in said and "its sha256 is" in said
    assert right in in_one_line(infer_here("--model", file, "--sha256", "0" * 64, ROOT))
    assert infer.digest(f"{right}  student.ts\n") == right  # as sha256sum prints it
    for wrong in ("", right[:12], right[:-1] + "x"):  # the first: of a variable that is not set
        said = infer_here("--model", file, "--sha256", wrong, ROOT)
        assert said.returncode == 2 and "64 hexadecimal digits" in said.stderr
    help_text = " ".join(infer_here("--help").stdout.split())
    assert "is a program, and loading it runs it" in help_text
    monkeypatch.setattr(infer, "load_torchscript", None)  # so another is refused before it runs
    assert "its sha256 is" in refusal(file, "0" * 64)
