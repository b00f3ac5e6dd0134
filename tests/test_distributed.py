"""Two processes under torchrun compute what one does; here over gloo, on CPUs."""

import csv
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, ROOT, call

import build_ensemble
import distill
import train_teacher
from common import distributed, models, training
from common.losses import labelled_cross_entropy
from common.models import load_checkpoint

# What torchrun starts: scripts one after the other, in float32 and with a student without batch
# norm, since the rounding of bfloat16 and the statistics of half a batch are not the same. With
# `die` process 1 is killed after its tenth step.
PROGRAM = """
import json, os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_distributed as test
from common import cli
test.in_float32_without_batch_norm(setattr)
validate = test.training.Run.validate
def validate_or_die(run, val):
    if {die} and run.steps_done == 10 and test.distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    validate(run, val)
test.training.Run.validate = validate_or_die
with test.distributed.processes():  # once: torch's store keeps the addresses of the first time
    for script, words in json.loads(sys.argv[1]):
        sys.argv = [script, *words]
        cli.run(getattr(test, script).main.__wrapped__)
"""


def in_float32_without_batch_norm(setattr):
    """Change the scripts of this process by means of `setattr`."""
    for module in (models, training):
        setattr(module, "precision", lambda device: None)

    def create_student(classes, img_size, pretrained=False, weights=None):
        return models.create_teacher("test_vit", classes, img_size)

    setattr(models, "create_student", create_student)
    setattr(distill, "export_student", lambda *_: None)


def torchrun(folder, calls, die=False):
    """Run scripts in two processes. calls: (script, words) pairs. Returns the finished process."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), die=die))
    plain = [(script.__name__, [str(word) for word in words]) for script, words in calls]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(program), json.dumps(plain)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def teacher(output, *more):
    words = ("--data-dir", "parts", "--view-size", 32, "--model", "test_vit", "--steps", 24)
    return train_teacher, (*words, "-b", 16, "--output", output, *CPU, *more)


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """Folders of the same teacher, ensemble and student: .one of one process, .two of two.

    .resumed: a teacher whose second process was killed, see .killed, and that went on.
    """
    home = tmp_path_factory.mktemp("both")
    before = os.getcwd()
    os.chdir(tiny.root)
    try:
        with pytest.MonkeyPatch.context() as patch:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            in_float32_without_batch_norm(patch.setattr)
            for script, words in stages(home / "one"):
                assert call(script.main, *words) == 0
            torch.set_num_threads(threads)
        killed = torchrun(home, [teacher(home / "resumed")], die=True)
        steps = load_checkpoint(home / "resumed" / "test_vit" / "last.pt")["steps"]
        resumed = teacher(home / "resumed", "--resume")
        process = torchrun(home, [*stages(home / "two"), resumed])
    finally:
        os.chdir(before)
    assert process.returncode == 0, process.stderr
    folders = {name: home / name for name in ("one", "two", "resumed")}
    return SimpleNamespace(**folders, printed=process.stdout, killed=killed, killed_after=steps)


def stages(home):
    """(script, words) of a teacher, the ensemble of the shared teachers, and a student of it."""
    teachers = ("runs/test_resnet/model.pt", "runs/test_vit/model.pt")
    student = ("runs/ensemble", "--steps", 12, "-b", 30, "--alpha", 0.5, "--balance-classes")
    return [
        teacher(home),
        (build_ensemble, (*teachers, "--views", 3, "-b", 8, "--output", home / "ensemble", *CPU)),
        (distill, (*student, "--output", home / "student", *CPU)),
    ]


def losses(run):
    with open(run / "log.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_write_the_very_files_of_an_ensemble_that_one_writes(both):
    names = sorted(file.name for file in (both.one / "ensemble").iterdir())
    assert len(names) == 4
    for name in names:
        one, two = (folder / "ensemble" / name for folder in (both.one, both.two))
        assert one.read_bytes() == two.read_bytes(), name


def test_a_teacher_of_two_processes_has_the_loss_curve_of_one(both):
    one, two = (losses(folder / "test_vit") for folder in (both.one, both.two))
    assert len(one) == 10
    assert one == pytest.approx(two, abs=1e-4)


def test_a_student_of_two_processes_has_the_loss_curve_of_one_with_uneven_labels(both):
    """Batches of 30 hold about 16 labelled pictures, in two shares of rarely the same number."""
    one, two = (losses(folder / "student") for folder in (both.one, both.two))
    assert len(one) == 10
    assert one == pytest.approx(two, abs=1e-4)


def test_mixed_labels_of_shares_count_as_in_one_process(monkeypatch):
    # Labels that sum to 0.3 and 1.9 in two shares: the mean over all is the two sums over 2.2.
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    shares = [torch.tensor([[0.3, 0.0], [0.0, 0.0]]), torch.tensor([[0.9, 0.0], [0.0, 1.0]])]
    sums = [0.3 * math.log(4 / 3), 0.9 * math.log(4 / 3) + math.log(2)]
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "mean", lambda own: torch.tensor(1.1))
    losses = [distributed.label_weight(y) * labelled_cross_entropy(logits, y) for y in shares]
    assert float(sum(losses) / 2) == pytest.approx(sum(sums) / 2.2)


def test_process_0_alone_prints(both):
    assert both.printed.count("test_vit step 3/24") == 1
    assert both.printed.count("2 processes") == 4


def test_a_run_that_lost_a_process_resumes_to_the_same_weights(both):
    assert both.killed.returncode != 0 and both.killed_after == 8
    assert "(SIGKILL)" in both.killed.stderr  # torchrun says so
    assert "[rank0]" not in both.killed.stderr  # and not process 0, which only missed the other
    whole, resumed = (load_checkpoint(f / "test_vit" / "last.pt") for f in (both.two, both.resumed))
    assert whole["weights_sha256"] == resumed["weights_sha256"]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(inside, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    script, words = teacher(tmp_path)
    assert call(script.main, *words) == 2
    assert "multiple of 3; 15 is one" in capfd.readouterr().err
    assert call(distill.main, "-b", 16, "--output", tmp_path / "s", *CPU) == 2
    assert not (tmp_path / "s").exists()
