"""The file that leaves: operating point, int8 twin, heatmaps, watch folder, C++."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
from common import data
from common.checkpoints import load
from common.cli import UserError
from common.export import correct_head, float_trunk, load_exported
from common.models import load_model
from common.operating_point import choose_threshold, pictures_needed, rates, wilson
from conftest import ROOT, SIDE, call
from infer import overlay

SCORES = np.array([0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.1, 0.05])
DEFECTIVE = np.array([True, True, True, True, False, False, False, False])


def test_a_miss_rate_target_gives_the_middle_of_the_highest_gap_that_keeps_it():
    strict = choose_threshold(SCORES, DEFECTIVE, max_miss_rate=0.1)  # none of four may pass
    assert strict["threshold"] == pytest.approx(0.25)  # between the good part at 0.2 and the defect at 0.3
    assert strict["validation"]["miss"]["count"] == 0 and strict["validation"]["false_alarm"]["count"] == 1
    loose = choose_threshold(SCORES, DEFECTIVE, max_miss_rate=0.25)  # one of four may
    assert loose["threshold"] == pytest.approx(0.65)  # between the good part at 0.6 and the second defect at 0.7
    assert loose["validation"]["miss"]["count"] == 1 and loose["validation"]["false_alarm"]["count"] == 0


def test_a_false_alarm_target_gives_the_middle_of_the_lowest_gap_that_keeps_it():
    point = choose_threshold(SCORES, DEFECTIVE, max_false_alarm_rate=0.25)
    assert point["threshold"] == pytest.approx(0.25)  # between the good part at 0.2 and the defect at 0.3
    assert point["validation"]["false_alarm"]["count"] == 1 and point["validation"]["miss"]["count"] == 0


def test_tied_scores_never_break_the_target():
    scores, defective = np.array([0.5, 0.5, 0.5, 0.5, 0.1]), np.array([True, True, True, True, False])
    assert choose_threshold(scores, defective, max_miss_rate=0.3)["validation"]["miss"]["count"] == 0


def test_wilson_interval_and_pictures_needed_by_hand():
    z2 = 1.959964 ** 2
    assert wilson(0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-6)
    assert wilson(5, 10) == pytest.approx((0.5 - 1.959964 * math.sqrt(2.5 + z2 / 4) / (10 + z2), 0.5 + 1.959964 * math.sqrt(2.5 + z2 / 4) / (10 + z2)))
    assert pictures_needed(0.05) == 59  # 0.95^58 = 0.0510, 0.95^59 = 0.0485
    assert rates([0.4], np.array([True]), 0.5)["false_alarm"] == {"rate": None, "count": 0, "n": 0, "interval": [0.0, 1.0]}


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory):
    """A student of the tiny chain with a good class, exported in float and int8."""
    output = tmp_path_factory.mktemp("edge") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny.root)
        assert call(distill.main, "--epochs", 8, "-b", 16, "--good-class", "level", "--max-int8-drop", 20,
                    "--bfloat16", "--output", output, "--device", "cpu") == 0
    return output


def test_files_say_what_they_are(edge):
    for name, precision in (("student.ts", "float32"), ("student.bf16.ts", "bfloat16"), ("student.int8.ts", "int8")):
        metadata = load_exported(edge / name)[1]
        assert metadata["precision"] == precision and metadata["good_class"] == "level"
        point = metadata["operating_point"]
        assert point["target"] == {"max_miss_rate": 0.05} and point["needed"] == 59
        assert point["validation"]["miss"]["rate"] <= 0.05
    assert metadata["weights_sha256"] == load(edge / "best.pt")["weights_sha256"]
    assert (edge / "student.bf16.ts").stat().st_size < 0.55 * (edge / "student.ts").stat().st_size
    assert (edge / "student.int8.ts").stat().st_size < 0.3 * (edge / "student.ts").stat().st_size


def test_mean_of_each_heatmap_is_its_class_logit_up_to_the_bias(edge, tiny):
    model, _ = load_model(edge / "best.pt", torch.device("cpu"))
    exported, metadata = load_exported(edge / "student.ts")
    picture = torch.from_numpy(data.read_picture(next((tiny.data / "test").rglob("*.png"))))
    probabilities, maps = exported.explain(picture)
    assert torch.equal(probabilities.argmax(1), exported(picture).argmax(1))
    logits = maps.mean((2, 3)) + model.backbone.fc.bias / metadata["temperature"]
    assert torch.allclose(torch.softmax(logits, 1), exported(picture), atol=1e-5)


def test_bfloat16_answers_as_float32_does_within_its_precision(edge, tiny):
    pictures = torch.from_numpy(np.stack([data.read_picture(f) for f in sorted((tiny.data / "test").rglob("*.png"))]))
    (expected, maps), (found, its_maps) = (load_exported(edge / name)[0].explain(pictures) for name in ("student.ts", "student.bf16.ts"))
    assert (expected - found).abs().max() < 0.1
    error = (maps - its_maps).abs().max() / maps.abs().max()
    assert 1e-4 < error < 0.05  # 8 bits of precision: neither float32 in disguise nor another network


def test_int8_runs_under_every_engine_of_this_torch_and_they_agree(edge, tiny):
    pictures = torch.from_numpy(np.stack([data.read_picture(f) for f in sorted((tiny.data / "test").rglob("*.png"))]))
    before, answers = torch.backends.quantized.engine, {}
    try:
        for engine in torch.backends.quantized.supported_engines:
            if engine != "none":
                torch.backends.quantized.engine = engine
                answers[engine] = load_exported(edge / "student.int8.ts")[0](pictures)
    finally:
        torch.backends.quantized.engine = before
    first = next(iter(answers.values()))
    for engine, answer in answers.items():
        assert (answer - first).abs().max() < 0.15, engine
        assert (answer.argmax(1) == first.argmax(1)).float().mean() > 0.9, engine
    floats = load_exported(edge / "student.ts")[0](pictures)
    assert (floats.argmax(1) == first.argmax(1)).float().mean() > 0.8


def test_int8_heatmaps_differ_from_float_ones_by_no_more_than_7_bits_can(edge, tiny):
    pictures = torch.from_numpy(np.stack([data.read_picture(f) for f in sorted((tiny.data / "test").rglob("*.png"))]))
    maps, its_maps = (load_exported(edge / name)[0].explain(pictures)[1].flatten() for name in ("student.ts", "student.int8.ts"))
    its_maps = its_maps * (maps @ its_maps) / (its_maps @ its_maps)  # each file has a temperature of its own
    error = (maps - its_maps).norm() / maps.norm()
    assert 1e-3 < error < 0.2, error


def test_the_corrected_head_gives_back_the_mean_logits(edge):
    student, _ = load_model(edge / "best.pt", torch.device("cpu"))
    pixels = 255 * torch.rand(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def trunk(normalised):  # as if quantisation shifted some features and blurred others
        features = float_trunk(student)(normalised)
        return features.round(decimals=0) + torch.arange(512).view(512, 1, 1) / 512

    corrected = correct_head(student, trunk, [pixels[:9], pixels[9:]])
    with torch.no_grad():
        expected, plain, found = (distill.logits_of(model, body)(pixels).mean(0) for model, body in
                                  ((student, float_trunk(student)), (student, trunk), (corrected, trunk)))
    assert torch.allclose(found, expected, atol=1e-3) and (plain - expected).abs().max() > 0.01


def test_an_int8_file_that_loses_too_much_is_not_written(edge, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny.root)
    monkeypatch.setattr(distill, "int8_trunk", lambda student, views: lambda pixels: torch.zeros(len(pixels), 512, 1, 1))
    output = tiny.root / "runs" / "broken"
    assert call(distill.main, "--epochs", 8, "-b", 16, "--output", output, "--device", "cpu") == 0
    assert "not written" in capsys.readouterr().out
    assert (output / "student.ts").is_file() and not (output / "student.int8.ts").exists()
    shutil.rmtree(output)


def run_infer(*words, **more):
    return subprocess.run([sys.executable, str(ROOT / "infer.py"), *map(str, words)], capture_output=True, text=True, **more)


def test_infer_decides_by_the_threshold_and_reviews_in_the_band(edge, tiny):
    folder = tiny.data / "test"
    threshold = load_exported(edge / "student.ts")[1]["operating_point"]["threshold"]
    plain = [json.loads(line) for line in run_infer("--model", edge / "student.ts", "--json", folder).stdout.splitlines()]
    assert len(plain) == 60
    for line in plain:
        assert line["decision"] == ("REJECT" if line["defect_score"] >= threshold else "PASS")
    scores = sorted(line["defect_score"] for line in plain)
    low, high = scores[20], scores[40]
    banded = run_infer("--model", edge / "student.ts", "--csv", "--review-band", low, high, folder).stdout.splitlines()
    assert banded[0] == "path,decision,class,probability,defect_score"
    assert [line.split(",")[1] for line in banded[1:]] == [
        "REJECT" if line["defect_score"] >= high else "REVIEW" if line["defect_score"] >= low else "PASS" for line in plain]
    info = json.loads(run_infer("--model", edge / "student.int8.ts", "--info").stdout)
    assert info["precision"] == "int8" and info["classes"] == ["cross", "level", "upright"]


def test_heatmaps_are_written_for_what_does_not_pass(edge, tiny, tmp_path):
    run = run_infer("--model", edge / "student.ts", "--heatmap", tmp_path / "maps", "--json", tiny.data / "test")
    assert run.returncode == 0, run.stderr
    rejected = {Path(v["path"]).stem for v in map(json.loads, run.stdout.splitlines()) if v["decision"] == "REJECT"}
    assert 35 < len(rejected) < 60 and {file.stem.split("_")[-1] for file in (tmp_path / "maps").glob("*.jpg")} == rejected


def test_red_lies_where_covering_the_picture_weakens_the_likeliest_defect():
    def student(frames):  # class 1 looks for something bright above right, class 2, never the likeliest, below left
        frames = frames.float() / 255
        return torch.softmax(torch.stack([torch.full((len(frames),), 0.5), 9 * frames[:, :, 4:12, 52:60].mean((1, 2, 3)),
                                          5 * frames[:, :, 52:60, 4:12].mean((1, 2, 3))], 1), 1)

    picture = np.zeros((64, 64, 3), np.uint8)
    picture[4:12, 52:60] = picture[52:60, 4:12] = 255
    image, defect = overlay(student, picture, 64, 0)
    red = np.asarray(image).astype(int)[..., 0] - np.asarray(image).astype(int)[..., 2]
    height, width = red.shape
    assert defect == 1 and red[height // 5, -width // 5] > 60
    assert np.abs(red[height // 2:, :width // 2]).max() <= 10


def start_watch(edge, folder):
    command = [sys.executable, "-u", str(ROOT / "infer.py"), "--model", str(edge / "student.ts"), "--watch", str(folder), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def record(folder):
    file = folder / "judged.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line)["key"][0] for line in text.splitlines() if line.endswith("}")]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_watched_folder_is_judged_once_and_whole_across_a_kill_and_half_written_files(edge, tiny, tmp_path):
    source = [file.read_bytes() for file in sorted((tiny.data / "test").rglob("*.png"))[:12]]
    first = start_watch(edge, tmp_path)
    for number, content in enumerate(source[:5]):
        (tmp_path / f"{number:02d}.png").write_bytes(content)
    half = open(tmp_path / "half.png", "wb")
    half.write(source[5][:200])
    half.flush()
    soon = time.time() + 100
    os.utime(tmp_path / "half.png", (soon, soon))  # just changed, however slow this machine is
    wait_until(lambda: len(record(tmp_path)) == 5)
    first.send_signal(signal.SIGKILL) if hasattr(signal, "SIGKILL") else first.kill()
    first.wait()
    for number, content in enumerate(source[6:9], 6):
        (tmp_path / f"{number:02d}.png").write_bytes(content)
    with open(tmp_path / "judged.jsonl", "a") as file:
        file.write('{"key": ["06.png", 1')  # a write that the kill cut off
    second = start_watch(edge, tmp_path)
    half.write(source[5][200:])
    half.close()
    wait_until(lambda: len(record(tmp_path)) == 9)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    wait_until(lambda: len(record(tmp_path)) == 10)
    second.kill()
    second.wait()
    names = record(tmp_path)
    assert sorted(names) == sorted([f"{n:02d}.png" for n in (0, 1, 2, 3, 4, 6, 7, 8)] + ["half.png", "broken.png"])
    assert names[-1] == "broken.png"
    lines = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert "error" in lines[-1] and all("decision" in line for line in lines[:-1])


@pytest.mark.parametrize("damage", ["foreign", "cut", "one bit of a weight"])
def test_a_foreign_truncated_or_damaged_file_is_refused_in_one_line(edge, tmp_path, damage):
    file = tmp_path / "student.ts"
    content = bytearray((edge / "student.ts").read_bytes())
    if damage == "foreign":
        torch.save({"a": 1}, file)
    elif damage == "cut":
        file.write_bytes(content[:100_000])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run = run_infer("--model", file, ROOT)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "export it again" in run.stderr
    with pytest.raises(UserError, match="export it"):
        load_exported(file)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_cpp_prints_the_probabilities_python_prints(edge, tiny, tmp_path):
    root = Path(torch.__file__).parent
    binary = tmp_path / "judge"
    subprocess.run(["g++", "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                    f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", str(ROOT / "tests/cpp/judge.cpp"), "-o", str(binary),
                    f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    picture = data.read_picture(next((tiny.data / "test").rglob("*.png")))
    picture.tofile(tmp_path / "picture.raw")
    for name in ("student.ts", "student.int8.ts"):
        run = subprocess.run([binary, edge / name, tmp_path / "picture.raw", *map(str, picture.shape[:2])], capture_output=True, text=True, check=True)
        expected = load_exported(edge / name)[0](torch.from_numpy(picture))[0]
        assert [float(line) for line in run.stdout.split()] == pytest.approx(expected.tolist(), abs=2e-5)
