"""The file that leaves: operating point, int8 twin, occlusion map, C++."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, DATASET, ROOT, SIZE, call, read_picture
from PIL import Image

import distill
import evaluate
import infer
from common import export, models, splits
from common.export import load_exported
from common.files import file_sha256
from common.metrics import defect_scores, rates
from common.models import load_checkpoint
from common.pictures import DecodedCache

# -------------------------------------------------------------------------------- exported files


@pytest.fixture(scope="module")
def edge(tiny):
    """The run folder of the tiny chain's student, whose good class is `level`."""
    return tiny.runs / "student"


@pytest.fixture(scope="module")
def frames(tiny):
    """uint8 [60, 40, 48, 3]: the test pictures as a camera gives them."""
    files = sorted((tiny.data / "test").rglob("*.png"))
    return torch.from_numpy(np.stack([read_picture(file) for file in files]))


def test_files_say_what_they_are(edge):
    for name, precision in (("student.ts", "float32"), ("student.int8.ts", "int8")):
        metadata = load_exported(edge / name)[1]
        assert metadata["precision"] == precision and metadata["good_classes"] == ["level"]
        assert metadata["weights_sha256"] == load_checkpoint(edge / "model.pt")["weights_sha256"]
        assert metadata["white_level"] == 65535
        point = metadata["operating_point"]
        assert (point["goal"], point["target"], point["needed"]) == ("miss", 0.05, 59)
        assert point["validation"]["miss"]["count"] == 0  # of so few none may pass
    int8, floats = ((edge / name).stat().st_size for name in ("student.int8.ts", "student.ts"))
    assert int8 < 0.3 * floats


def test_exported_file_agrees_with_the_checkpoint_from_the_picture_file_on(edge, tiny, frames):
    model, state = models.load_model(edge / "model.pt", torch.device("cpu"))
    exported, metadata = load_exported(edge / "student.ts")
    cache = DecodedCache(tiny.root / "runs" / "decoded")
    _, pictures = splits.open_labelled(cache, tiny.data / "test", DATASET)
    with torch.no_grad():
        logits = model(pictures.batch(range(60)).permute(0, 3, 1, 2).float())
        expected = F.softmax(logits / metadata["temperature"], dim=1)
        alone = torch.cat([exported(frame) for frame in frames])
        batch, planes = exported(frames), exported(frames.permute(0, 3, 1, 2))
    assert frames.shape[1:] == (40, 48, 3)  # so the resize inside the file is at work
    for probabilities in (alone, batch, planes):
        assert torch.allclose(probabilities, expected, atol=1e-5)
    assert metadata["classes"] == state["classes"] == ["cross", "level", "upright"]


def test_calibration_and_threshold_are_of_what_the_file_itself_answers(edge, tiny):
    exported, metadata = load_exported(edge / "student.ts")
    dataset = load_checkpoint(edge / "model.pt")["dataset"]
    moved = {"dir": str(tiny.data)}
    cache = DecodedCache(tiny.root / "runs" / "decoded")
    _, val, _ = splits.open_training(cache, {**dataset, **moved})
    p = exported(val.batch(range(len(val))))
    scores, defective = defect_scores(p, 1), (val.labels != 1).numpy()
    point = metadata["operating_point"]
    assert rates(scores, defective, point["threshold"]) == point["validation"]
    accuracy = float((p.argmax(1) == val.labels).float().mean())
    assert metadata["validation"]["accuracy"] == pytest.approx(accuracy)


def test_int8_runs_under_every_engine_of_this_torch_and_they_agree(edge, frames, monkeypatch):
    before, answers = torch.backends.quantized.engine, {}
    try:
        for engine in set(torch.backends.quantized.supported_engines) - {"none"}:
            monkeypatch.setattr(infer, "ENGINES", (engine,))  # else the first one that works runs
            student, metadata = infer.load_student(edge / "student.int8.ts")
            assert metadata["runtime"].endswith(f"engine {engine}")
            answers[engine] = torch.from_numpy(student(frames.numpy()))
    finally:
        torch.backends.quantized.engine = before
    first = next(iter(answers.values()))
    for engine, answer in answers.items():
        assert (answer - first).abs().max() < 0.15, engine
        assert (answer.argmax(1) == first.argmax(1)).float().mean() > 0.9, engine
    floats = load_exported(edge / "student.ts")[0](frames)
    assert (floats.argmax(1) == first.argmax(1)).float().mean() > 0.8


def test_int8_is_neither_float32_in_disguise_nor_another_network(edge):
    frames = torch.randint(0, 256, (20, *SIZE, 3), dtype=torch.uint8)
    floats, int8 = (load_exported(edge / name)[0] for name in ("student.ts", "student.int8.ts"))
    gap = (floats(frames).clamp(min=1e-9).log() - int8(frames).clamp(min=1e-9).log()).abs().max()
    assert 1e-4 < gap < 2.0


def test_an_int8_file_that_loses_too_much_is_not_written(edge, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny.root)
    shutil.copytree(edge, tmp_path / "s")

    def broken(student, views):
        return lambda pixels: torch.zeros(len(pixels), 512, 1, 1)

    monkeypatch.setattr(export, "int8_trunk", broken)
    words = ("--steps", 105, "-b", 16, "--resume", "--output", tmp_path / "s")
    assert call(distill.main, *words, *CPU) == 0
    assert "not written" in capsys.readouterr().out
    assert (tmp_path / "s" / "student.ts").is_file()
    assert not (tmp_path / "s" / "student.int8.ts").exists()


def test_a_rare_class_that_an_int8_file_loses_counts_as_much_as_a_common_one(tmp_path, capsys):
    labels = torch.tensor([0] * 96 + [1] * 4)
    right = F.one_hot(labels, 2).float()
    blind = right.clone()
    blind[96:98] = right[0]  # 2 of 100 pictures, but half of the rare class
    limits = export.Limits("miss", 0.05, max_int8_drop=2.0, parts=[])
    assert export.int8_loss(tmp_path, blind, right, labels, limits) is None
    assert "+2.0 points of val accuracy lost (2 of 100 pictures), +25.0" in capsys.readouterr().out
    blind[96] = right[96]
    assert export.int8_loss(tmp_path, blind, right, labels, limits)["int8_drop"] == 1.0


def test_an_int8_file_may_lose_as_much_as_when_its_run_began(edge):
    def kept(asked):
        flags = dict.fromkeys(("good_class", "max_miss_rate", "max_false_alarm_rate"))
        args = SimpleNamespace(**flags, max_int8_drop=asked)
        distill.keep_operating_point(edge, args)
        return args.max_int8_drop

    assert (kept(None), kept(0.0)) == (20, 0.0)


def test_another_target_needs_no_training(edge, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny.root)
    shutil.copytree(edge, tmp_path / "s")
    words = ("--steps", 105, "-b", 16, "--resume", "--output", tmp_path / "s")
    target = ("--good-class", "cross", "--max-false-alarm-rate", 0.2)
    assert call(distill.main, *words, *target, *CPU) == 0
    metadata = load_exported(tmp_path / "s" / "student.ts")[1]
    point = metadata["operating_point"]
    assert (point["goal"], point["target"]) == ("false_alarm", 0.2)
    assert metadata["good_classes"] == ["cross"]
    said = capsys.readouterr().out
    for name in ("student.ts", "student.int8.ts"):
        file = tmp_path / "s" / name
        assert f"{file}: sha256 {file_sha256(file)}\n" in said  # for infer.py --sha256
    assert (tmp_path / "s" / "model.pt").read_bytes() == (edge / "model.pt").read_bytes()

    assert call(distill.main, *words, *CPU) == 0  # not asked for again, both stay as they are
    kept = load_exported(tmp_path / "s" / "student.ts")[1]
    assert (kept["operating_point"], kept["good_classes"]) == (point, ["cross"])

    (tmp_path / "s" / "student.ts").unlink()  # as of a run that was killed before its export
    assert call(distill.main, *words, *CPU) == 0
    begun = load_exported(tmp_path / "s" / "student.ts")[1]
    assert (begun["operating_point"]["goal"], begun["good_classes"]) == ("miss", ["level"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_cpp_prints_the_probabilities_python_prints(edge, frames, tmp_path):
    root, binary = Path(torch.__file__).parent, tmp_path / "judge"
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    libraries = [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-Wl,--no-as-needed"]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
    source = str(ROOT / "tests/cpp/judge.cpp")
    subprocess.run(["g++", *flags, *include, source, "-o", str(binary), *libraries], check=True)
    frames[0].numpy().tofile(tmp_path / "picture.raw")
    for name in ("student.ts", "student.int8.ts"):
        command = [binary, edge / name, tmp_path / "picture.raw", "40", "48"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        expected = load_exported(edge / name)[0](frames[0])[0]
        found = [float(line) for line in run.stdout.split()]
        assert found == pytest.approx(expected.tolist(), abs=2e-5)


# ---------------------------------------------------------------------------------------- occlusion


class BrightCorner(torch.nn.Module):
    """A student whose class 1 looks for something bright above right, class 2 below left."""

    def forward(self, frames):
        frames = frames / 255
        features = torch.stack([
            torch.full((len(frames),), 0.5),
            9 * frames[:, 0, 4:12, 52:60].mean((1, 2)),
            5 * frames[:, 0, 52:60, 4:12].mean((1, 2)),
        ], 1)
        return features[:, :, None, None]


def bright_corner():
    """A student of three classes: uint8 frames [B, 64, 64, 3] -> probabilities [B, 3]."""
    student = models.create_student(3, [64, 64])
    student.mean.zero_()
    student.std.fill_(1.0)
    student.backbone.fc = torch.nn.Linear(3, 3)
    student.backbone.fc.weight.data = torch.eye(3)
    student.backbone.fc.bias.data.zero_()
    deployed = export.Deployed(student, BrightCorner(), [64, 64])
    return lambda frames: deployed(torch.from_numpy(frames)).numpy()


def test_a_heatmap_is_red_where_the_defect_is(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[4:12, 52:60] = 255
    metadata = {"view_size": [64, 64], "white_level": 65535, "classes": ["good", "a", "b"],
                "good_classes": ["good"], "operating_point": {"threshold": 0.0}}
    judge = infer.Judge(bright_corner(), metadata, heatmaps=tmp_path)
    with Image.open(tmp_path / judge(Path("x.png"), picture)["heatmap"]) as sheet:
        image = np.asarray(sheet).astype(int)[18:]  # below the words
    red = image[..., 0] - image[..., 1]
    assert red[:240, 240:].max() > 100 and max(red[240:].max(), red[:240, :200].max()) < 40


@pytest.mark.parametrize("size, places, hottest", [
    ((96, 240), (5, 12), (0, 11)), ((240, 96), (13, 4), (0, 3)), ((32, 1568), (1, 64), (0, 63)),
])
def test_a_rectangle_has_as_many_places_a_side_as_fit_its_shape(size, places, hottest):
    judged = []

    def bright_above_right(frames):
        judged.append(len(frames))
        p = 0.5 + frames[:, :12, -12:, 0].mean((1, 2)) / 600
        return np.stack([1 - p, p], 1)

    picture = np.zeros((*size, 3), np.uint8)
    picture[:12, -12:] = 255
    heat = infer.occlusion_map(bright_above_right, picture, [0])
    assert heat.shape == places and sum(judged) == 1 + heat.size
    assert np.unravel_index(heat.argmax(), heat.shape) == hottest


def test_heat_lies_where_covering_the_picture_weakens_the_likeliest_defect():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[4:12, 52:60] = 255
    picture[52:60, 4:12] = 255
    student = bright_corner()
    heat = infer.occlusion_map(student, picture, [0])
    assert student(picture).argmax() == 1 and heat.shape == (8, 8)
    above_right, below_left = (slice(0, 2), slice(6, 8)), (slice(6, 8), slice(0, 2))
    assert heat[above_right].max() > 0.9
    assert heat[4:].max() < 0.1  # class 2 is not the likeliest
    heat = infer.occlusion_map(student, picture, [1])  # now it is the likeliest defect
    assert heat[below_left].max() > 0.9 and heat[:4, 4:].max() < 0.1


def test_without_a_good_class_there_are_classes_and_no_decisions(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.root)
    words = ("--steps", 1, "-b", 16, "--output", tmp_path / "s", *CPU)
    assert call(distill.main, *words) == 0
    student, metadata = infer.load_student(tmp_path / "s" / "student.ts")
    assert metadata["operating_point"] is None
    judge = infer.Judge(student, metadata, heatmaps=tmp_path / "maps")
    verdict = judge(tiny.data / "test" / "level" / "l000.png")
    assert verdict["decision"] is None and (tmp_path / "maps" / verdict["heatmap"]).is_file()
    words = ("--test-dirs", "parts/test", "--skip-audit", "--output", tmp_path / "r", *CPU)
    assert call(evaluate.main, tmp_path / "s" / "student.ts", *words) == 0
    monkeypatch.setattr("sys.argv", ["infer.py", "--model", str(tmp_path / "s" / "student.ts"),
                                     "--review-band", "0.2", "0.7", "parts/test"])
    with pytest.raises(infer.Refused, match="no threshold for --review-band; .*--good-class"):
        infer.run()
