"""Bundle -> tokens, labels or hidden states, with onnxruntime, tokenizers, numpy and jinja2 alone."""

from phimoe_onnx.runtime.classification import Classification
from phimoe_onnx.runtime.conversation import Conversation
from phimoe_onnx.runtime.logprobs import Alternative, Logprobs
from phimoe_onnx.runtime.model import PhiMoE, Score
from phimoe_onnx.runtime.probe import Routing
from phimoe_onnx.runtime.request import Options
from phimoe_onnx.runtime.row import Generation, Piece

__all__ = [
    "Alternative",
    "Classification",
    "Conversation",
    "Generation",
    "Logprobs",
    "Options",
    "PhiMoE",
    "Piece",
    "Routing",
    "Score",
]
