"""modeling.py and the bundles made of it against transformers: 4.57 for everything but head_dim, which only 5 knows."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phimoe_onnx import PhiMoE
from phimoe_onnx.config import read_config
from phimoe_onnx.export.pipeline import export
from phimoe_onnx.parity import reference
from tests.checkpoints import MODEL, SHAPES, longrope, write_checkpoint

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

FOUR = transformers.__version__.startswith("4.")
four = pytest.mark.skipif(not FOUR, reason="transformers 5 keeps the short rope factors beyond the boundary")
five = pytest.mark.skipif(FOUR, reason="transformers 4 ignores head_dim and knows no fused experts")
