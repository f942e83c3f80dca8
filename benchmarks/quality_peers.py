"""Other tools' quantisers for quality.py: each rounds the matrices of a model by its own code, in place.

llama.cpp needs `gguf` and libggml-base of llama-cpp-python; ONNX Runtime's quantisers need `onnx`; NNCF needs `nncf`
and `openvino`, best in an environment of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phimoe_onnx import layered
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.exporter.kinds import kind
from phimoe_onnx.parity.bits import ROUNDED, matrices
from phimoe_onnx.parity.products import Products

BLOCK = 32  # of ONNX Runtime's quantisers and of NNCF's groups
SUPERBLOCK = 256  # of llama.cpp's K-quants
ROWS = 2048  # of a matrix's inputs, at the most, that are kept for quantisers that calibrate

# Rounds a parameter of modeling.py in place and returns its bits a weight.
RoundAll = Callable[[str, Tensor], float]
# A matrix [N, K] and what it is multiplied with, [rows, K], -> the rounded matrix and its bytes.
Round = Callable[[NDArray[np.float32], "NDArray[np.float32] | None"], tuple[NDArray[np.float32], int]]

# llama.cpp's presets by kind of weight, as its llama_tensor_get_type has them for 16 experts; "" is every other kind.
# `more` holds in the first and the last eighth of the layers, and in every third between them.
PRESETS: dict[str, Callable[[bool], dict[str, str]]] = {
    "Q8_0": lambda more: {"": "Q8_0"},
    "Q6_K": lambda more: {"": "Q6_K"},
    "Q4_K_M": lambda more: {
        **{"v_proj": "Q6_K" if more else "Q4_K", "down_proj": "Q6_K" if more else "Q4_K", "lm_head": "Q6_K"},
        "": "Q4_K",
    },
    "IQ4_XS": lambda more: {"v_proj": "Q5_K", "lm_head": "Q6_K", "": "IQ4_XS"},
    "Q4_0": lambda more: {"lm_head": "Q6_K", "": "Q4_0"},
    "Q3_K_M": lambda more: {"v_proj": "Q4_K", "o_proj": "Q4_K", "down_proj": "Q4_K", "lm_head": "Q6_K", "": "Q3_K"},
    "Q2_K": lambda more: {"v_proj": "Q4_K", "o_proj": "Q3_K", "down_proj": "Q3_K", "lm_head": "Q6_K", "": "Q2_K"},
    "IQ3_XXS": lambda more: {
        **{"v_proj": "Q4_K", "q_proj": "IQ2_S", "k_proj": "IQ2_S", "o_proj": "IQ3_S", "lm_head": "Q5_K"},
        "": "IQ3_XXS",
    },
    "IQ2_XS": lambda more: {"v_proj": "Q4_K", "lm_head": "Q5_K", "": "IQ2_XS"},
}
NEED_IMATRIX = ("IQ2_XS", "IQ3_XXS")


@dataclass(frozen=True)
class Setting:
    """What peers may use: the checkpoint, token ids of a calibration text (or none) in windows of `length`, and where
    libggml-base is, if it is told.
    """

    checkpoint: Path
    config: PhiMoEConfig
    calibration: list[int]
    length: int
    ggml: Path | None

    @cached_property
    def inputs(self) -> dict[tuple[str, int | None], NDArray[np.float32]]:
        """Up to `ROWS` rows [rows, K] that each matrix is multiplied with on the calibration text, by its name in
        modeling.py and its expert.

        Raises:
            PhiMoEError: there is no calibration text.
        """
        if not self.calibration:
            raise PhiMoEError("needs a text to calibrate on; give --calibration FILE")
        kept: dict[tuple[str, int | None], list[NDArray[np.float32]]] = {}

        def look(name: str, expert: int | None, weight: Tensor, x: Tensor) -> None:
            parts = kept.setdefault((name, expert), [])
            parts.append(x[: ROWS - sum(map(len, parts))].numpy().copy())

        read = layered.checkpoint_weights(self.config, parameters(self.config, read_headers(self.checkpoint)))
        products, size = Products(read, look), self.length
        starts = range(0, len(self.calibration), size)
        with products:
            texts = [layered.Text(self.calibration[start : start + size]) for start in starts]
            ran = layered.run(self.config, products.read, texts)
            head = layered.head(self.config, "text-generation", products.read)
            for each in ran:
                if len(kept.get(("lm_head.weight", None), [])) * size < ROWS:
                    head(each.hidden)
        return {key: np.concatenate(parts) for key, parts in kept.items()}


def peers(setting: Setting) -> Iterator[tuple[str, str, RoundAll]]:
    """A source, a name and what rounds; what is missing shows when it is called."""
    for preset in PRESETS:
        for imatrix in (True,) if preset in NEED_IMATRIX else (False, True):
            name = f"{preset}, importance matrix" if imatrix else preset
            yield "llama.cpp", name, by_preset(setting, preset, imatrix)
    for name, config in ORT.items():
        yield "onnxruntime", name, each_matrix(setting, onnxruntime_rounds(config), calibrated="GPTQ" in name)
    for name, options in NNCF.items():
        yield "nncf", name, each_matrix(setting, nncf_rounds(options), calibrated=options["calibrated"])


def each_matrix(setting: Setting, rounds: Round, *, calibrated: bool) -> RoundAll:
    """What applies `rounds` to a parameter, or to each expert of a stack."""

    def round_all(name: str, parameter: Tensor) -> float:
        total = 0
        for number, matrix in enumerate(parameter if parameter.ndim == 3 else [parameter]):
            expert = number if parameter.ndim == 3 else None
            x = setting.inputs.get((name, expert)) if calibrated else None
            if calibrated and (x is None or not len(x)):
                raise PhiMoEError(f"the calibration text never uses {name}, expert {expert}; give a longer one")
            rounded, nbytes = rounds(matrix.detach().numpy().copy(), x)
            matrix.data.copy_(torch.from_numpy(np.ascontiguousarray(rounded, np.float32)))
            total += nbytes
        return 8 * total / parameter.numel()

    return round_all


# llama.cpp


def preset_form(config: PhiMoEConfig, preset: str, name: str) -> str:
    """The type that a preset has for a parameter."""
    parts = name.removesuffix(".weight").split(".")
    n, count = int(parts[2]) if "layers" in parts else 0, config.num_hidden_layers
    more = n < count // 8 or n >= 7 * count // 8 or (n - count // 8) % 3 == 2
    types = PRESETS[preset](more)
    return types.get(parts[-1], types[""])


def preset_bits(config: PhiMoEConfig, preset: str) -> dict[str, float]:
    """The bits a weight of each matrix that is rounded."""
    import gguf

    found = {}
    for name in matrices(config):
        if kind(name) in ROUNDED:
            form = gguf.GGMLQuantizationType[preset_form(config, preset, name)]
            size, nbytes = gguf.GGML_QUANT_SIZES[form]
            found[name] = 8 * nbytes / size
    return found


def by_preset(setting: Setting, preset: str, imatrix: bool) -> RoundAll:
    """Rounds each parameter to the preset's type for it."""

    def round_all(name: str, parameter: Tensor) -> float:
        form = preset_form(setting.config, preset, name)
        return each_matrix(setting, ggml_rounds(library(setting.ggml), form), calibrated=imatrix)(name, parameter)

    return round_all


def library(file: Path | None) -> Any:
    """libggml-base, as it is told or as llama-cpp-python has it.

    Raises:
        PhiMoEError: there is none.
    """
    if file is None:
        spec = importlib.util.find_spec("llama_cpp")
        found = list(Path(str(spec.origin)).parent.glob("lib/libggml-base.*")) if spec else []
        if not found:
            raise PhiMoEError("there is no libggml-base; pip install llama-cpp-python gguf, or give --ggml FILE")
        file = found[0]
    ggml = ctypes.CDLL(str(file))
    ggml.ggml_quantize_chunk.restype = ggml.ggml_row_size.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return ggml


def ggml_rounds(ggml: Any, form: str) -> Round:
    """ggml_quantize_chunk and gguf.dequantize.

    A superblock is 256 wide. Rows that are no multiple of it are joined until they are, which handicaps the peer: one
    superblock then spans several rows.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[form]

    def rounds(matrix: NDArray[np.float32], x: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], int]:
        joined = math.lcm(matrix.shape[1], SUPERBLOCK) // matrix.shape[1]
        rows = np.ascontiguousarray(matrix.reshape(-1, joined * matrix.shape[1]))
        out = np.zeros((len(rows), ggml.ggml_row_size(int(kind), rows.shape[1])), np.uint8)
        importance = None
        if x is not None:  # as llama.cpp's imatrix: the mean square of each column's input
            mean = np.square(x, dtype=np.float64).mean(axis=0).astype(np.float32)
            importance = np.ascontiguousarray(np.tile(np.maximum(mean, 1e-12), joined))
        weights = None if importance is None else importance.ctypes.data
        ggml.ggml_quantize_chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
        return gguf.dequantize(out, kind).astype(np.float32).reshape(matrix.shape), out.nbytes

    return rounds


# ONNX Runtime

ORT: dict[str, Callable[[Any, Any], Any]] = {
    "MatMulNBits RTN int8": lambda q, data: q.DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, bits=8),
    "MatMulNBits RTN int4": lambda q, data: q.DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, bits=4),
    "MatMulNBits RTN int4, zero points": lambda q, data: q.DefaultWeightOnlyQuantConfig(BLOCK, bits=4),
    "MatMulNBits k_quant int4": lambda q, data: q.KQuantWeightOnlyQuantConfig(),
    "MatMulNBits HQQ int4": lambda q, data: q.HQQWeightOnlyQuantConfig(BLOCK, bits=4),
    "MatMulNBits GPTQ int4": lambda q, data: q.GPTQWeightOnlyQuantConfig(data, block_size=128),
    "MatMulNBits RTN int2, zero points": lambda q, data: q.DefaultWeightOnlyQuantConfig(BLOCK, bits=2),
}


def onnxruntime_rounds(config: Callable[[Any, Any], Any]) -> Round:
    """MatMulNBitsQuantizer on a graph of one MatMul; the weights are read back by running it on the unit matrix."""

    def rounds(matrix: NDArray[np.float32], x: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], int]:
        import onnx
        import onnxruntime
        from onnx import helper, numpy_helper
        from onnxruntime.quantization import CalibrationDataReader
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = [] if x is None else [{"x": x}]

            def get_next(self) -> dict[str, NDArray[np.float32]] | None:
                return self.left.pop() if self.left else None

        n, k = matrix.shape
        value = [helper.make_tensor_value_info(name, 1, ["rows", size]) for name, size in (("x", k), ("y", n))]
        weight = numpy_helper.from_array(np.ascontiguousarray(matrix.T), "w")
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "one", value[:1], value[1:], [weight]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        logging.disable(logging.INFO)
        # is_symmetric is for GPTQ and k_quant alone: their zero points take an even number of blocks a row only
        made = quantizer.MatMulNBitsQuantizer(
            model, block_size=BLOCK, is_symmetric=True, accuracy_level=0, algo_config=config(quantizer, Reader())
        )
        with redirect_stdout(io.StringIO()):
            made.process()
        found = made.model.model if hasattr(made.model, "model") else made.model
        operators = [node.op_type for node in found.graph.node]
        if "MatMulNBits" not in operators:
            raise PhiMoEError(f"MatMulNBitsQuantizer left {operators} of a MatMul [{k}, {n}]")
        stored = next(node for node in found.graph.node if node.op_type == "MatMulNBits").input[1:]
        sizes = [numpy_helper.to_array(each).nbytes for each in found.graph.initializer if each.name in stored]
        session = onnxruntime.InferenceSession(
            onnx.ModelProto.SerializeToString(found), providers=["CPUExecutionProvider"]
        )
        return session.run(None, {"x": np.eye(k, dtype=np.float32)})[0].T, sum(sizes)

    return rounds


# NNCF, OpenVINO's

NNCF: dict[str, dict[str, Any]] = {
    "int4": {"calibrated": False},
    "int4, AWQ and scale estimation": {"calibrated": True, "awq": True, "scale_estimation": True},
    "int4, GPTQ and scale estimation": {"calibrated": True, "gptq": True, "scale_estimation": True},
}


def nncf_rounds(options: dict[str, Any]) -> Round:
    """nncf.compress_weights on a graph of one MatMul; the weights are read back by running it on the unit matrix."""

    def rounds(matrix: NDArray[np.float32], x: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], int]:
        import nncf
        import openvino
        from openvino import opset13

        k = matrix.shape[1]
        data = opset13.parameter([-1, -1, k], np.float32, name="x")
        product = opset13.matmul(data, opset13.constant(matrix), False, True, name="product")
        model = openvino.Model([product], [data])
        chosen = {name: value for name, value in options.items() if name != "calibrated"}
        if x is not None:
            chosen["dataset"] = nncf.Dataset([x[None, start : start + 256] for start in range(0, len(x), 256)])
        nncf.set_log_level(logging.ERROR)
        with redirect_stdout(io.StringIO()):
            model = nncf.compress_weights(
                model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=1.0, group_size=BLOCK, all_layers=True, **chosen
            )
        constants = [each for each in model.get_ordered_ops() if each.get_type_name() == "Constant"]
        nbytes = sum(each.get_byte_size() for each in constants if each.get_output_size() and len(each.shape) > 1)
        config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        compiled = openvino.Core().compile_model(model, "CPU", config)
        return compiled(np.eye(k, dtype=np.float32)[None])[0][0].T, nbytes

    return rounds
