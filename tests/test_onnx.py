"""The exported student as ONNX: the same answers, and a device that needs no torch."""

import copy
import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SIZE, call, read_picture
from PIL import Image

import distill
import evaluate
import infer
from common import export, export_onnx, splits
from common.files import CHECKSUM, EXPORTED, UserError, checksummed
from common.models import load_checkpoint
from common.pictures import DecodedCache

for name in export_onnx.PACKAGES:
    pytest.importorskip(name)

PAIRS = (("student.ts", "student.onnx"), ("student.int8.ts", "student.int8.onnx"))
STUDENT = ("--steps", 105, "-b", 16, "--good-class", "level", *CPU)  # as in conftest.py
AGAIN = ("--resume", "--onnx", "--max-int8-drop", 20, *STUDENT)
DEVICE = ("numpy numpy.libs PIL pillow.libs onnxruntime google flatbuffers packaging "
          "filelock").split()


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory):
    """A run folder with the files of both formats, of the finished student of the tiny chain."""
    home = tmp_path_factory.mktemp("onnx") / "student"
    shutil.copytree(tiny.runs / "student", home)
    export_again(home, tiny.root)
    return home


@pytest.fixture
def untraced(edge, monkeypatch):
    """distill.py takes the student's float32 graph from its file: to trace one takes 5 s."""
    import onnx

    def stored(deployed):
        temperature = export.load_exported(edge / "student.onnx")[1]["temperature"]
        model = onnx.load(edge / "student.onnx")
        del model.metadata_props[:]
        return export_onnx.Graph(export_onnx.calibrated(model, 1 / temperature))

    monkeypatch.setattr(export_onnx.Graph, "of", stored)


def export_again(home, root):
    """Call distill.py, in a process of its own, for the files of a finished student."""
    command = [sys.executable, ROOT / "distill.py", *map(str, AGAIN), "--output", home]
    subprocess.run(command, cwd=root, check=True, capture_output=True)


def verdicts(model, folder):
    """The printed verdicts of infer.py on all pictures below a folder."""
    command = [sys.executable, ROOT / "infer.py", "--model", model, folder, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_graph_that_is_not_the_trained_network_is_not_written(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.runs / "student", tmp_path / "s")
    of = export_onnx.Graph.of

    def another(deployed):
        changed = copy.deepcopy(deployed)
        changed.bias[0] += 0.1
        return of(changed)

    monkeypatch.setattr(export_onnx.Graph, "of", another)
    monkeypatch.chdir(tiny.root)
    with pytest.raises(RuntimeError, match="student.onnx: its probabilities differ"):
        call(distill.main, *AGAIN, "--output", tmp_path / "s")
    assert not (tmp_path / "s" / "student.onnx").exists()


def test_both_formats_say_the_same_from_the_picture_file_on(edge, tiny):
    for (name, twin), allowed in zip(PAIRS, (1e-4, 0.1)):
        ours, theirs = verdicts(edge / name, tiny.data), verdicts(edge / twin, tiny.data)
        assert len(ours) == len(theirs) > 100
        for a, b in zip(ours, theirs):
            gaps = [abs(a["probabilities"][k] - b["probabilities"][k]) for k in a["probabilities"]]
            assert max(gaps) < allowed
            if allowed == 1e-4:
                assert (a["decision"], a["class"]) == (b["decision"], b["class"])


def test_both_formats_see_the_same_evidence(edge, tiny):
    picture = read_picture(sorted((tiny.data / "test" / "cross").iterdir())[0])
    for (name, twin), allowed in zip(PAIRS, (1e-3, 0.2)):
        maps = []
        for file in (edge / name, edge / twin):
            student, metadata = infer.load_student(file)
            good = metadata["classes"].index("level")
            maps.append(infer.occlusion_map(student, infer.resize(picture, SIZE), [good]))
        assert maps[0].max() > 0.2 and np.abs(maps[0] - maps[1]).max() < allowed


def test_twins_hold_the_same_metadata_but_for_what_int8_measures(edge):
    for name, twin in PAIRS:
        ours, theirs = (export.load_exported(edge / file)[1] for file in (name, twin))
        assert ours.keys() == theirs.keys()
        differ = {key for key in ours if ours[key] != theirs[key]}
        measured = {"temperature", "operating_point", "validation"}
        measured |= {"int8_drop", "int8_disagreement"}
        assert differ <= (measured if "int8" in name else set())
        assert (edge / twin).stat().st_size == pytest.approx((edge / name).stat().st_size, rel=0.05)


def test_what_int8_says_is_calibrated_as_the_file_answers(edge, tiny, monkeypatch):
    monkeypatch.chdir(tiny.root)
    network, metadata = export.load_exported(edge / "student.int8.onnx")
    dataset = load_checkpoint(edge / "model.pt")["dataset"]
    _, val, _ = splits.open_training(DecodedCache("runs/decoded"), dataset)
    p = network(val.batch(range(len(val))))
    nll = float(-p[torch.arange(len(p)), val.labels].log().mean())
    assert metadata["validation"]["nll"] == pytest.approx(nll, abs=1e-4)


def test_a_device_without_torch_judges_watches_and_draws(edge, tiny, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in DEVICE:
        found = [Path(home, name) for home in site.getsitepackages() if Path(home, name).exists()]
        if found:
            (packages / name).symlink_to(found[0])
    for file in (ROOT / "infer.py", edge / "student.onnx", edge / "student.int8.onnx"):
        shutil.copy(file, tmp_path)
    pictures = sorted((tiny.data / "test" / "cross").iterdir())[:3]

    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)}
    start = {"cwd": tmp_path, "env": environment, "text": True}

    def run(*words):
        command = [sys.executable, "-S", *map(str, words)]
        return subprocess.run(command, capture_output=True, **start)

    assert "No module named 'torch'" in run("-c", "import torch").stderr
    for model in ("student.onnx", "student.int8.onnx"):
        done = run("infer.py", "--model", model, "--heatmap", "red", "--csv", *pictures)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith("path,decision") and len(lines) == 4
        assert [line.split(",")[2] for line in lines[1:]] == ["cross"] * 3
        drawn = list((tmp_path / "red").iterdir())
        assert len(drawn) == 3 and Image.open(drawn[0]).size[0] == 480
        shutil.rmtree(tmp_path / "red")
        assert json.loads(run("infer.py", "--model", model, "--info").stdout)["view_size"] == SIZE
    (tmp_path / "shots").mkdir()
    shutil.copy(pictures[0], tmp_path / "shots")
    words = ["infer.py", "--model", "student.onnx", "--watch", "shots", "--json"]
    with subprocess.Popen(
        [sys.executable, "-S", *words], stdout=subprocess.PIPE, **start
    ) as watcher:
        assert json.loads(watcher.stdout.readline())["class"] == "cross"
        watcher.kill()
    refused = run("infer.py", "--model", tiny.runs / "student" / "student.ts", *pictures)
    assert refused.returncode == 2 and "pip install torch" in refused.stderr


def test_cut_flipped_and_foreign_files_are_refused_in_one_line(edge, tmp_path):
    import onnx

    whole = (edge / "student.int8.onnx").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bare = onnx.load_from_string(whole)
    del bare.metadata_props[:]
    wrong = onnx.load_from_string(whole)
    for entry in wrong.metadata_props:
        if entry.key == "metadata.json":
            entry.value = entry.value.replace('"schema": 7', '"schema": 6')
    foreign = {
        "cut": whole[:-1000], "flipped": bytes(flipped), "empty": b"", "text": b"no" * 99,
        "unchecked": bare.SerializeToString(),
        "bare": bare.SerializeToString(), "old": wrong.SerializeToString(),
    }
    for name, data in foreign.items():
        file = tmp_path / f"{name}.onnx"
        if name in ("bare", "old"):
            with checksummed(file, export_onnx.CHECKSUM) as output:
                output.write(data)
        else:
            file.write_bytes(data)
        with pytest.raises(infer.Refused, match="export it again"):
            infer.load_student(file)
        with pytest.raises(UserError, match="not a student.onnx"):
            export.load_exported(file)


def test_onnx_runtime_finds_no_relu_and_no_unquantised_convolution_in_the_int8_file(edge):
    import onnx

    nodes = onnx.load_from_string((edge / "student.int8.onnx").read_bytes()).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Conv") == 20 and "Relu" not in kinds  # else it takes three times as long
    for node in nodes:
        if node.op_type == "Conv":
            assert {made_by[name].op_type for name in node.input} == {"DequantizeLinear"}


def test_both_graphs_are_of_the_versions_that_onnxruntime_1_14_reads(edge):
    import onnx

    for _, name in PAIRS:
        graph = onnx.load(edge / name)
        onnx.checker.check_model(graph, full_check=True)
        domains = [(each.domain, each.version) for each in graph.opset_import]
        assert (graph.ir_version, domains) == (8, [("", 18)])


def test_infer_knows_the_length_of_both_checksums():
    endings = {".ts": CHECKSUM, ".onnx": export_onnx.CHECKSUM}
    lengths = {kind: len(ending.format("0" * 64)) for kind, ending in endings.items()}
    assert lengths == infer.CHECKSUMS


def test_a_second_export_is_the_same_to_the_byte(edge, tiny, tmp_path):
    shutil.copytree(edge, tmp_path / "again")
    export_again(tmp_path / "again", tiny.root)
    for name in EXPORTED:
        assert (tmp_path / "again" / name).read_bytes() == (edge / name).read_bytes(), name


def test_an_int8_graph_that_loses_too_much_is_not_written(
    edge, tiny, untraced, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tiny.root)
    shutil.copytree(edge, tmp_path / "s")

    def broken(graph, views):  # it names the least likely class
        return export_onnx.Graph(export_onnx.calibrated(graph.model, -1.0))

    monkeypatch.setattr(export_onnx.Graph, "quantised", broken)
    assert call(distill.main, "--resume", "--onnx", "--output", tmp_path / "s", *STUDENT) == 0
    assert "student.int8.onnx not written" in capsys.readouterr().out
    kept = {name for name in EXPORTED if (tmp_path / "s" / name).is_file()}
    assert kept == set(EXPORTED) - {"student.int8.onnx"}


def test_a_graph_whose_head_has_other_names_is_not_calibrated_in_silence(edge):
    import onnx

    model = onnx.load_from_string((edge / "student.onnx").read_bytes())
    export_onnx.calibrated(model, 2.0)
    for each in model.graph.initializer:
        each.name = each.name.replace("weight", "val_7")
    with pytest.raises(RuntimeError, match="no initialisers called weight and bias"):
        export_onnx.calibrated(model, 2.0)


def test_files_of_onnx_are_written_again_with_the_others_and_stay_after_an_error(
    edge, tiny, untraced, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tiny.root)
    folder = tmp_path / "s"
    shutil.copytree(edge, folder)
    words = ("--resume", *STUDENT, "--output", folder)
    before = {name: (folder / name).read_bytes() for name in EXPORTED}

    def fail(*_):
        raise RuntimeError("in the middle of an export")

    with monkeypatch.context() as patch:
        patch.setattr(export_onnx.Graph, "quantised", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            call(distill.main, *words)
    assert {name: (folder / name).read_bytes() for name in EXPORTED} == before
    assert call(distill.main, *words, "--max-miss-rate", 0.3, "--max-int8-drop", 20) == 0
    for name in EXPORTED:  # all of one export
        assert export.load_exported(folder / name)[1]["operating_point"]["target"] == 0.3


@pytest.mark.parametrize("name", ["student.onnx", "student.int8.onnx"])
def test_a_file_that_answers_otherwise_than_its_network_is_not_written(
    edge, tiny, untraced, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tiny.root)
    shutil.copytree(edge, tmp_path / "s")
    before = {each: (tmp_path / "s" / each).read_bytes() for each in EXPORTED}
    right = export_onnx.Graph.save

    def save(graph, metadata, path):
        wrong = {**metadata, "temperature": 2 * metadata["temperature"]}
        right(graph, wrong if path.name == name else metadata, path)
        if path.name == name:  # the file says the right temperature and answers with another
            monkeypatch.setattr(export, "load_exported", pretend(metadata))

    def pretend(metadata, load=export.load_exported):
        return lambda path: (load(path)[0], metadata)

    monkeypatch.setattr(export_onnx.Graph, "save", save)
    with pytest.raises(RuntimeError, match=f"{name}: its probabilities differ"):
        call(distill.main, *AGAIN, "--output", tmp_path / "s")
    assert {each: (tmp_path / "s" / each).read_bytes() for each in EXPORTED} == before


def test_missing_packages_are_named_before_any_work(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny.root)
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnx" else name)
    assert call(distill.main, "--onnx", "--output", tmp_path / "s", *CPU) == 2
    assert "pip install onnx\n" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_evaluate_measures_onnx_files(edge, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.root)
    models = [edge / name for pair in PAIRS for name in pair]
    words = ("--data-dir", "parts", "--output", tmp_path / "report", *CPU)
    assert call(evaluate.main, *models, *words) == 0
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())["models"]
    for name, twin in PAIRS:
        ours, theirs = (found[(edge / file).as_posix()] for file in (name, twin))
        assert theirs["kind"] == "exported" and theirs["latency_ms"] > 0
        assert theirs["mean_accuracy"] == pytest.approx(ours["mean_accuracy"], abs=0.03)
