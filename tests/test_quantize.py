"""Round to nearest: its bounds, its layout, and that ONNX Runtime's operators read it as `dequantize` does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phimoe_onnx import modeling
from phimoe_onnx.exporter.quantize.format import Format
from phimoe_onnx.exporter.quantize.rtn import round_to_nearest
from phimoe_onnx.exporter.recipe import BLOCK_SIZES_2

FORMATS = [Format(bits, block) for bits in (4, 8) for block in (16, 32, 128)]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
# far from where a scale is subnormal
value = st.floats(-1e4, 1e4, width=32).map(lambda v: 0.0 if abs(v) < 1e-30 else v)


def rounded(format: Format, weight: Tensor) -> tuple[Tensor, ...]:
    return round_to_nearest(weight, format, "lm_head.weight", None)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Format, Tensor]:
    format = draw(st.sampled_from([Format(4, 16), Format(8, 16), Format(4, 32)]))
    n, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    values = draw(st.lists(value, min_size=n * blocks * format.block_size, max_size=n * blocks * format.block_size))
    return format, torch.tensor(values).view(n, -1)


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_the_error_is_at_most_half_a_step(drawn: tuple[Format, Tensor]) -> None:
    """But on the side opposite the largest magnitude, whose last step is cut: there it is at most a whole one."""
    format, weight = drawn
    codes, scales = rounded(format, weight)
    assert codes.dtype == torch.uint8
    assert codes.shape == (len(weight), weight.shape[1] * format.bits // 8)
    assert scales.shape == (len(weight), weight.shape[1] // format.block_size)
    step = scales.repeat_interleave(format.block_size, dim=1)
    highest = (1 << (format.bits - 1)) - 1
    error = (format.dequantize(codes, scales) - weight).abs()
    clipped = torch.where(step == 0, 0.0, weight / step) > highest + 0.5
    slack = 1 + 1e-4
    assert (error[~clipped] <= step.abs()[~clipped] / 2 * slack).all()
    assert (error[clipped] <= step.abs()[clipped] * slack).all()


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_the_largest_magnitude_of_a_block_is_kept(drawn: tuple[Format, Tensor]) -> None:
    format, weight = drawn
    got = format.dequantize(*rounded(format, weight)).unflatten(1, (-1, format.block_size))
    blocks = weight.unflatten(1, (-1, format.block_size))
    torch.testing.assert_close(got.abs().amax(dim=-1), blocks.abs().amax(dim=-1), rtol=1e-5, atol=0.0)


@every_format
def test_blocks_of_zeros_stay_zero(format: Format) -> None:
    weight = torch.zeros(2, 2 * format.block_size)
    weight[1, -1] = 3.0
    codes, scales = rounded(format, weight)
    assert torch.equal(format.dequantize(codes, scales), weight)
    assert scales.count_nonzero() == 1
    assert scales.isfinite().all()


@every_format
def test_what_is_representable_is_exact(format: Format) -> None:
    """Every code of the format, in a block whose largest magnitude is the lowest code's."""
    zero = 1 << (format.bits - 1)
    codes = torch.arange(8 * format.block_size).view(8, -1) % (2 * zero)
    codes[:, 0] = 0
    for scale in (0.5, -0.25):
        weight = (codes - zero) * scale
        stored, scales = rounded(format, weight)
        assert torch.equal(scales, torch.full((8, 1), scale))
        assert torch.equal(format.dequantize(stored, scales), weight)


def test_the_first_of_two_codes_is_in_the_low_nibble() -> None:
    weight = torch.tensor([[-8.0, -7, 0, 7, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, -1]])
    codes, scales = rounded(Format(4, 16), weight)
    assert scales.tolist() == [[1.0]]
    assert [f"{code:02x}" for code in codes[0].tolist()] == ["10", "f8", "a9", "cb", "88", "88", "88", "78"]
    codes, scales = rounded(Format(8, 16), weight * 16)
    assert codes[0].tolist() == [0, 16, 128, 240, 144, 160, 176, 192, *[128] * 7, 112]


def test_scales_of_half_precision_are_what_the_codes_are_rounded_with() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    format = Format(8, 32, "float16")
    codes, scales = rounded(format, weight)
    assert scales.dtype == torch.float16
    step = scales.float().abs().repeat_interleave(32, dim=1)
    inside = (weight / scales.float().repeat_interleave(32, dim=1)) < 127.5
    assert ((format.dequantize(codes, scales) - weight).abs() <= step / 2 * (1 + 1e-4))[inside].all()


def run(op_type: str, inputs: list[Tensor | None], **attributes: Any) -> np.ndarray:
    """One com.microsoft operator in ONNX Runtime."""
    arrays = {f"input_{n}": tensor.numpy() for n, tensor in enumerate(inputs) if tensor is not None}
    values = {name: ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape) for name, array in arrays.items()}
    initializers = []
    for name in list(arrays)[1:]:  # but the first are weights, as in a bundle
        if name not in ("input_1",) or op_type != "QMoE":
            values[name].const_value = ir.tensor(arrays.pop(name), name=name)
            initializers.append(values[name])
    output = ir.val("output", ir.DataType.FLOAT)
    node = ir.node(
        op_type,
        [values.get(f"input_{n}") for n in range(len(inputs))],
        attributes,
        domain="com.microsoft",
        outputs=[output],
    )
    graph = ir.Graph(
        [values[name] for name in arrays],
        [output],
        nodes=[node],
        initializers=initializers,
        name="one",
        opset_imports={"": 18, "com.microsoft": 1},
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, arrays)[0]


@every_format
def test_matmul_nbits_reads_it(format: Format) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 256), torch.randn(40, 256), torch.randn(40)
    codes, scales = rounded(format, weight)
    blocks = 256 // format.block_size
    attributes = {"N": 40, "K": 256, "bits": format.bits, "block_size": format.block_size, "accuracy_level": 0}
    got = run("MatMulNBits", [x, codes.view(40, blocks, -1), scales, None, None, bias], **attributes)
    np.testing.assert_allclose(got, x @ format.dequantize(codes, scales).T + bias, atol=1e-4)


@every_format
def test_gather_block_quantized_reads_it(format: Format) -> None:
    torch.manual_seed(0)
    codes, scales = rounded(format, torch.randn(30, 256))
    ids = torch.tensor([[3, 29, 0], [3, 1, 2]])
    attributes = {"bits": format.bits, "block_size": format.block_size, "gather_axis": 0, "quantize_axis": 1}
    got = run_gather(codes, ids, scales, attributes)
    assert np.array_equal(got, format.dequantize(codes, scales)[ids])


def run_gather(codes: Tensor, ids: Tensor, scales: Tensor, attributes: dict[str, int]) -> np.ndarray:
    """GatherBlockQuantized, whose first input is a weight and whose second is not."""
    values = [
        ir.val(name, ir.DataType.from_numpy(t.numpy().dtype), t.shape)
        for name, t in zip("abc", (codes, ids, scales), strict=True)
    ]
    for index, tensor in ((0, codes), (2, scales)):
        values[index].const_value = ir.tensor(tensor.numpy(), name=values[index].name)
    output = ir.val("output", ir.DataType.FLOAT)
    node = ir.node("GatherBlockQuantized", values, attributes, domain="com.microsoft", outputs=[output])
    graph = ir.Graph(
        [values[1]],
        [output],
        nodes=[node],
        initializers=[values[0], values[2]],
        name="one",
        opset_imports={"": 18, "com.microsoft": 1},
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"b": ids.numpy()})[0]


@pytest.mark.parametrize("format", [Format(4, 32), Format(4, 64)], ids=str)
def test_qmoe_reads_it(format: Format) -> None:
    """4 bits; with 8 QMoE rounds activations to int8 whatever accuracy_level says."""
    torch.manual_seed(0)
    number, hidden, intermediate, tokens = 5, 64, 128, 9
    x, gate_up, down = (
        torch.randn(tokens, hidden),
        torch.randn(number, 2 * intermediate, hidden),
        torch.randn(number, hidden, intermediate),
    )
    weights, chosen = torch.rand(tokens, 2) + 0.1, torch.rand(tokens, number).topk(2).indices
    stored = [rounded(format, stack) for stack in (gate_up, down)]
    gate_up, down = (format.dequantize(*parts) for parts in stored)
    expected = modeling.experts(x[None], weights[None], chosen[None], gate_up, down)[0]
    fc1 = [torch.stack(part.chunk(2, dim=1), dim=2).flatten(1, 2) for part in stored[0]]  # gate and up in turns
    probs = torch.full((tokens, number), -1e4).scatter(1, chosen, weights.log())
    got = run(
        "QMoE",
        [x, probs, *fc1, None, *stored[1]],
        k=2,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        expert_weight_bits=4,
        block_size=format.block_size,
        accuracy_level=0,
    )
    got = got * weights.sum(dim=1, keepdim=True).numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(expected.std()), rtol=1e-4)


@pytest.mark.parametrize("block_size", BLOCK_SIZES_2)
def test_2_bits_take_the_fast_path(block_size: int) -> None:
    """In which activations are rounded to int8, so that the result is near and not the same."""
    torch.manual_seed(0)
    format, number = Format(2, block_size), 4
    x, weight = torch.randn(3, 256), torch.randn(40, 256)
    codes, scales = rounded(format, weight)
    expected = x @ format.dequantize(codes, scales).T
    attributes = {"N": 40, "K": 256, "bits": 2, "block_size": block_size}
    stored = [codes.view(40, 256 // block_size, -1), scales]
    np.testing.assert_allclose(run("MatMulNBits", [x, *stored], **attributes, accuracy_level=0), expected, atol=1e-4)
    error = np.abs(run("MatMulNBits", [x, *stored], **attributes, accuracy_level=4) - expected.numpy())
    assert 1e-3 < error.mean() / expected.std() < 2e-2

    gate_up, down = torch.randn(number, 2 * 128, 256) / 16, torch.randn(number, 256, 128)
    stored = [rounded(format, stack) for stack in (gate_up, down)]
    gate_up, down = (format.dequantize(*parts) for parts in stored)
    chosen = torch.tensor([[0, 1], [2, 0], [3, 2]])
    expected = modeling.experts(x[None], torch.full((1, 3, 2), 0.5), chosen[None], gate_up, down)[0]
    fc1 = [torch.stack(part.chunk(2, dim=1), dim=2).flatten(1, 2) for part in stored[0]]
    got = run(
        "QMoE",
        [x, torch.full((3, number), -1e4).scatter(1, chosen, 0.0), *fc1, None, *stored[1]],
        k=2,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        expert_weight_bits=2,
        block_size=block_size,
        accuracy_level=4,
    )
    assert 1e-3 < np.abs(got - expected.numpy()).mean() / expected.std() < 3e-2


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_unpacking_is_the_inverse_of_packing(data: st.DataObject) -> None:
    bits, count = data.draw(st.sampled_from([4, 8])), data.draw(st.integers(1, 9))
    format = Format(bits, 16, symmetric=False)
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    packed = format.pack(codes.to(torch.uint8)[None])
    assert packed.shape == (1, format.widths(16 * count)[2])
    assert format.unpack(packed, count)[0].tolist() == codes.tolist()


def with_zeros(format: Format, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each block's own range, from its smallest to its largest number."""
    blocks = weight.unflatten(-1, (-1, format.block_size))
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    largest = (1 << format.bits) - 1
    scales = (high - low) / largest
    zeros = (-low / scales).round().clamp(0, largest)
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, largest)
    return format.pack(codes.flatten(-2).to(torch.uint8)), scales, format.pack(zeros.to(torch.uint8))


ASYMMETRIC = [Format(bits, block, symmetric=False) for bits in (4, 8) for block in (16, 64)]


@pytest.mark.parametrize("format", ASYMMETRIC, ids=str)
@pytest.mark.parametrize("k", [192, 256])  # the first has an odd number of blocks of 64: zeros end in half a byte
def test_the_operators_read_zero_points(format: Format, k: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, k), torch.randn(40, k) + 0.5
    codes, scales, zeros = with_zeros(format, weight)
    assert tuple(part.shape[-1] for part in (codes, scales, zeros)) == format.widths(k)
    assert sum(part.nbytes for part in (codes, scales, zeros)) == sum(format.nbytes(40, k))
    expected = format.dequantize(codes, scales, zeros)
    step = scales.repeat_interleave(format.block_size, dim=1)
    assert ((expected - weight).abs() <= step * 1.01).all()
    attributes = {"N": 40, "K": k, "bits": format.bits, "block_size": format.block_size, "accuracy_level": 0}
    got = run("MatMulNBits", [x, codes.view(40, k // format.block_size, -1), scales, zeros], **attributes)
    np.testing.assert_allclose(got, x @ expected.T, atol=1e-4)
