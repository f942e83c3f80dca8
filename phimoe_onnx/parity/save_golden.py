"""What `verify` gathers for a golden file while it compares."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx._version import __version__
from phimoe_onnx.bundle import Manifest
from phimoe_onnx.checkpoint.adapter import Adapter
from phimoe_onnx.checkpoint.source import digest
from phimoe_onnx.checkpoint.tensors import shard_files
from phimoe_onnx.config import read_config
from phimoe_onnx.parity.comparison import spread
from phimoe_onnx.parity.golden import Golden, Header, Stored, as_object, seen, top_ids, weights_of
from phimoe_onnx.parity.report import Report
from phimoe_onnx.progress import Progress, counter


class Kept:
    """The arrays of a golden file in parts, a window each, and the outputs' standard deviations, likewise."""

    def __init__(self) -> None:
        self.arrays: dict[str, list[NDArray[Any]]] = defaultdict(list)
        self.scales: dict[str, list[float]] = defaultdict(list)
        self._first = 0  # token of the next window

    def logits(self, expected: NDArray[np.float32], stored: NDArray[np.float32] | None) -> None:
        """Takes in a window's logits [S, V], the reference's and those with the stored weights, if these differ."""
        ids = top_ids(expected)
        self.arrays["top_ids"].append(ids)
        for prefix, outputs in self._named(expected, stored).items():
            for name, array in seen(outputs, ids, self._first).items():
                if prefix or name != "best":  # the reference's is the first of the top ids
                    self.arrays[prefix + name].append(array)
        self._first += len(expected)

    def outputs(self, expected: NDArray[np.float32], stored: NDArray[np.float32] | None) -> None:
        """Takes in the outputs of another task."""
        for prefix, outputs in self._named(expected, stored).items():
            self.arrays[f"{prefix}outputs"].append(outputs)

    def _named(
        self, expected: NDArray[np.float32], stored: NDArray[np.float32] | None
    ) -> dict[str, NDArray[np.float32]]:
        named = {"": expected} | ({} if stored is None else {"stored_": stored})
        for prefix, outputs in named.items():
            self.scales[prefix].append(spread(outputs))
        return named

    def golden(
        self,
        report: Report,
        manifest: Manifest,
        checkpoint: Path,
        adapter: Adapter | None,
        new_tokens: int,
        progress: Progress,
    ) -> Golden:
        """All of it, with what the finished report says; reads the checkpoint once for its SHA-256."""
        files = [checkpoint / "config.json", *(checkpoint / name for name in shard_files(checkpoint))]
        total = sum(file.stat().st_size for file in files)
        header = Header(
            tool_version=__version__,
            task=report.task,
            checkpoint=checkpoint.resolve().name,
            checkpoint_sha256=digest(files, counter(progress, "hashing the checkpoint", total)),
            adapter_sha256=None if adapter is None else digest(adapter.files, lambda nbytes: None),
            config=as_object(read_config(checkpoint)),
            windows=tuple(report.windows),
            scales=tuple(self.scales[""]),
            perplexity=report.perplexity.get("reference"),
            new_tokens=new_tokens,
            stored=self._stored(report, manifest),
        )
        axes = {"routing": 1}  # its first are the layers
        arrays = {name: np.concatenate(parts, axis=axes.get(name, 0)) for name, parts in self.arrays.items()}
        return Golden(header, arrays)

    def _stored(self, report: Report, manifest: Manifest) -> Stored | None:
        if report.stored_to_reference is None or report.routing_agreement is None:
            return None
        return Stored(
            files=weights_of(manifest),
            scales=tuple(self.scales["stored_"]),
            perplexity=report.perplexity.get("stored"),
            routing_agreement=report.routing_agreement,
            to_reference=report.stored_to_reference,
        )
