"""The exported student as ONNX, for devices without torch: the same metadata, and the same answers.

Needs onnx, onnxscript and onnxruntime beside torch; `require_packages` says so before any work. An
.onnx holds a graph and numbers, no program. Its input is `pictures`, uint8 [B, S, S, 3] at the view
size; resizing is left to infer.py.
"""

import json
import tempfile
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import ONNX_SEAL, check_seal, sealed

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTISED = ["Conv", "Relu", "Add", "MaxPool"]  # the head stays in float32
TOLERANCE = 1e-4  # of a probability, between the eager model and the file


def require_packages(names=PACKAGES):
    """Raise a UserError that names what is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def graph_of(deployed):
    """An onnx.ModelProto of an `export.Deployed`, which must have a float32 trunk."""
    example = torch.zeros(2, deployed.view_size, deployed.view_size, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deployed.eval(),
            (example,),
            input_names=["pictures"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:  # where in our source each came from
        del node.metadata_props[:]
    return model


def quantised(model, views):
    """A float32 `graph_of` after static quantisation: 8-bit weights per channel, QDQ.

    views: iterable of float [B, 3, S, S] in [0, 255] that ranges of activations are measured on.
    Activations are unsigned, so that a ReLU is nothing but the rounding of what comes before it.
    Weights use 7 of 8 bits ("reduce_range"): processors without VNNI add pairs of products in 16
    bits, which 8 would overflow.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            frames = (view.round().to(torch.uint8).permute(0, 2, 3, 1) for view in views)
            self.feeds = ({"pictures": frame.numpy()} for frame in frames)

        def get_next(self):
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, prepared, done = (Path(folder, f"{number}.onnx") for number in range(3))
        onnx.save(model, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            done,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(done)


def set_temperature(model, temperature):
    """Divide the logits of a graph by `temperature`, in place."""
    from onnx import numpy_helper

    for each in model.graph.initializer:
        if each.name in ("weight", "bias"):  # the head, as `export.Deployed` calls it
            value = numpy_helper.to_array(each) / np.float32(temperature)
            each.CopyFrom(numpy_helper.from_array(value, each.name))


def logits_by(model):
    """A function from uint8 frames [B, S, S, 3] to log p, logits up to a constant of each row."""
    session = session_of(model.SerializeToString())
    return lambda frames: probabilities(session, frames).clamp(min=1e-30).log()


def session_of(data):
    """ONNX Runtime's session for the bytes of a file, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def probabilities(session, frames):
    """float32 [B, K], rows summing to 1; frames: uint8 [B, S, S, 3]."""
    return torch.from_numpy(session.run(None, {"pictures": frames.numpy()})[0])


def save(model, metadata, path, eager=None):
    """Write a graph with metadata.json inside.

    Refuses (RuntimeError, no file) when it differs by more than TOLERANCE in a probability from the
    `eager` model it was made from, where that is given.
    """
    entry = model.metadata_props.add()
    entry.key, entry.value = "metadata.json", json.dumps(metadata, indent=1)
    data = model.SerializeToString(deterministic=True)
    if eager:
        check_parity(eager, session_of(data))
    with sealed(path, ONNX_SEAL) as file:
        file.write(data)


@torch.inference_mode()
def check_parity(eager, session):
    """Raise RuntimeError where the graph answers otherwise than the eager model."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        shape = (count, eager.view_size, eager.view_size, 3)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        gap = float((eager(frames) - probabilities(session, frames)).abs().max())
        if not gap <= TOLERANCE:
            raise RuntimeError(
                f"the ONNX graph differs from the eager model by {gap:.1e}; nothing was written"
            )


def load(path):
    """(`probabilities` of frames, metadata as text) of an .onnx file; raises many kinds."""
    check_seal(path, ONNX_SEAL)
    session = session_of(Path(path).read_bytes())
    metadata = session.get_modelmeta().custom_metadata_map["metadata.json"]
    return partial(probabilities, session), metadata
