"""Files of common/ can be copied: each is imported alone, and what comes along is counted."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {"torch", "torchvision", "timm", "numpy", "PIL", "tqdm", "jinja2"}
FILES = {"errors", "files"}
ALONE = {  # module: (the project's modules that come along, packages it needs)
    "errors": (set(), set()),
    "files": ({"errors"}, set()),
    "losses": (set(), {"torch"}),
    "calibration": (set(), {"torch"}),
    "views": (set(), {"torch", "numpy"}),
    "metrics": (set(), {"numpy"}),
    "threshold": (set(), {"numpy"}),
    "ensemble": (FILES | {"losses"}, {"torch", "numpy"}),
    "checkpoints": (FILES, {"torch"}),
    "export": (FILES | {"calibration", "metrics", "onnx_file", "threshold"}, {"torch", "numpy"}),
}
PROBE = """
import importlib, json, sys
torch_brings = set()
if "torch" in sys.argv[2].split(","):
    import torch
    torch_brings = set(sys.modules)
importlib.import_module("common." + sys.argv[1])
print(json.dumps(sorted(set(sys.modules) - torch_brings)))
"""


@pytest.mark.parametrize("name", ALONE)
def test_a_copied_module_brings_along_no_more_than_it_says(name):
    modules, packages = ALONE[name]
    command = [sys.executable, "-c", PROBE, name, ",".join(packages)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(run.stdout)
    ours = {m.removeprefix("common.") for m in loaded if m.startswith("common.")}
    assert ours == modules | {name}
    assert HEAVY & set(loaded) <= packages
