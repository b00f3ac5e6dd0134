"""The exported student as ONNX, for devices without torch: the same metadata, and the same answers.

Needs onnx, onnxscript and onnxruntime beside torch; `require_packages` says so before any work. An
.onnx holds a graph and numbers, no program. Its input is `pictures`, uint8 [B, H, W, 3] at the view
size; resizing is left to infer.py.
"""

import json
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from common.files import UserError, checksummed

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTISED = ["Conv", "Relu", "Add", "MaxPool"]  # the head stays in float32
HEAD = ("weight", "bias")  # as `export.Deployed` calls it
# `files.CHECKSUM` as an entry of metadata in the format of ONNX, which is its file's last.
CHECKSUM = "r\x57\n\x13sha256_of_all_above\x12@{}"
OPSET, IR_VERSION = 18, 8  # of 2022: what onnxruntime reads from 1.14 on


def require_packages():
    """Raise a UserError that names what is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class Graph:
    """A student as an onnx.ModelProto, not calibrated yet."""

    def __init__(self, model):
        import onnxruntime

        self.model = model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @classmethod
    def of(cls, deployed):
        """The graph of an `export.Deployed`, which must have a float32 trunk."""
        example = torch.zeros(2, *deployed.view_size, 3, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                deployed.eval(),
                (example,),
                input_names=["pictures"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        for node in program.model_proto.graph.node:  # where in our source each came from
            del node.metadata_props[:]
        return cls(program.model_proto)

    def quantised(self, views):
        """This float32 graph after static quantisation: 8-bit weights per channel, QDQ.

        views: iterable of float [B, 3, H, W] in [0, 255] that ranges of activations are measured
        on. Activations are unsigned, so that a ReLU is nothing but the rounding of what comes
        before it. Weights use 7 of 8 bits ("reduce_range"): processors without VNNI add pairs of
        products in 16 bits, which 8 would overflow.
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
            onnx.save(self.model, plain)
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
            return Graph(onnx.load(done))

    def logits(self, frames):
        """log p, logits up to a constant: float32 [B, K]; frames: uint8 [B, H, W, 3]."""
        (probabilities,) = self.session.run(None, {"pictures": frames.numpy()})
        return torch.from_numpy(probabilities).clamp(min=1e-30).log()

    def save(self, metadata, path):
        """Write the graph with its temperature, and metadata.json inside."""
        model = calibrated(self.model, metadata["temperature"])
        model.ir_version = IR_VERSION
        own = [each for each in model.opset_import if not each.domain]
        del model.opset_import[:]  # the quantiser names domains that no node is of
        model.opset_import.extend(own)
        entry = model.metadata_props.add()
        entry.key, entry.value = "metadata.json", json.dumps(metadata, indent=1)
        with checksummed(path, CHECKSUM) as file:
            file.write(model.SerializeToString(deterministic=True))


def calibrated(model, temperature):
    """A copy of a ModelProto with the logits divided by `temperature`."""
    from onnx import numpy_helper

    copy = type(model)()
    copy.CopyFrom(model)
    head = [each for each in copy.graph.initializer if each.name in HEAD]
    if len(head) != len(HEAD):
        raise RuntimeError(f"the graph has no initialisers called {' and '.join(HEAD)}")
    for each in head:
        divided = numpy_helper.to_array(each) / np.float32(temperature)
        each.CopyFrom(numpy_helper.from_array(divided, each.name))
    return copy
