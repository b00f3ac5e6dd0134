"""Files of common/ can be copied: each is imported alone, and what comes along is counted."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {"torch", "torchvision", "timm", "numpy", "PIL", "tqdm", "jinja2"}
ALONE = {  # module: (the project's modules that come along, packages it needs)
    "files": (set(), set()),
    "losses": (set(), {"torch"}),
    "views": (set(), {"torch", "numpy"}),
    "metrics": (set(), {"numpy"}),
    "ensemble": ({"files", "losses"}, {"torch", "numpy"}),
    "export": ({"export_onnx", "files", "losses", "metrics"}, {"torch", "numpy"}),
}
# For each module a fork of a bare interpreter, or of one that has imported torch, which takes 2 s.
PROBE = """
import importlib, json, os, sys

def probe(name):
    before = set(sys.modules)
    importlib.import_module("common." + name)
    print(json.dumps([name, sorted(set(sys.modules) - before)]), flush=True)

for needs_torch, names in enumerate(json.loads(sys.argv[1])):
    if needs_torch:
        import torch
    for name in names:
        child = os.fork()
        if not child:
            probe(name)
            os._exit(0)
        os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def loaded():
    """{module: what was imported with it, beside what torch brings to those that need it}."""
    bare = [name for name, (_, packages) in ALONE.items() if "torch" not in packages]
    words = json.dumps([bare, [name for name in ALONE if name not in bare]])
    command = [sys.executable, "-c", PROBE, words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("name", ALONE)
def test_a_copied_module_brings_along_no_more_than_it_says(loaded, name):
    modules, packages = ALONE[name]
    ours = {m.removeprefix("common.") for m in loaded[name] if m.startswith("common.")}
    assert ours == modules | {name}
    assert HEAVY & set(loaded[name]) <= packages
