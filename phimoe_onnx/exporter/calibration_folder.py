"""The folder in which a calibration grows, beside the bundle: what is finished, with which a killed run goes on.

It is an export's own, and a mark shows that: the first line of its journal. Beside it only plain files with a
calibration's names are an export's; whatever else is found is named in an error and left alone, as in staging.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.quantize.calibrated import loaded, words
from phimoe_onnx.exporter.recipe import HEAD, LAYER, ROUTER
from phimoe_onnx.exporter.staging import beside, in_the_way, is_folder, look, named, write_new

JOURNAL = ".journal"
DRAFT = ".draft"  # behind the name of a file that is being written
MARK = b"phimoe-export, an unfinished calibration;"
logger = logging.getLogger(__name__)
_OWN = re.compile(r"(\d+\.(attention|router|states|\d+)|head|\.journal)(\.draft)?")


@dataclass(frozen=True)
class Facts:
    """Of an expert: how many of the text's tokens chose it, and how far it leans on the others' instead, 0 to 1."""

    layer: int
    expert: int
    tokens: int
    shrinkage: float


class Unit:
    """Tensors that become one file: of each parameter (an expert's is called NAME.EXPERT) its parts by their kind."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.facts: Facts | None = None

    def add(self, parameter: str, parts: dict[str, Tensor]) -> None:
        """Takes a parameter."""
        self.tensors |= {f"{parameter}:{kind}": part.contiguous() for kind, part in parts.items()}


def check_calibration(output: Path) -> None:
    """Raises ExportError where what no export made stands where a calibration of `output` needs a folder."""
    _strangers(_folder(output))


def _folder(output: Path) -> Path:
    return beside(named(output), "calibration")


class CalibrationFolder:
    """What a calibration has found so far.

    Args:
        output: the bundle, beside which the folder is made.

    Attributes:
        path: where it is.
        finished: how many layers are; the head counts as one behind the last.
    """

    def __init__(self, output: Path) -> None:
        self.path = _folder(output)
        self.finished = 0

    def begin(self, plan: str) -> None:
        """Makes the folder, or finds what an earlier run of this plan has finished; the caller holds the output's lock.

        Args:
            plan: a hash of everything that decides what is found; what another plan found is removed.

        Raises:
            ExportError: the folder cannot be written, or something else is in its place.
        """
        head = MARK + f" {plan}\n".encode()
        try:
            _strangers(self.path)
            self.path.mkdir(exist_ok=True)
            self.finished = _finished(self.path / JOURNAL, head)
            if self.finished == 0:
                self._clear()
                write_new(self.path / JOURNAL, head)
        except OSError as error:
            raise self._failed(error) from None

    @contextlib.contextmanager
    def unit(self, name: str) -> Iterator[Unit]:
        """Something to fill, which is a file at the end of the block."""
        unit = Unit()
        yield unit
        # one key: safetensors writes several in any order
        self._save(name, unit.tensors, {"facts": json.dumps(unit.facts and asdict(unit.facts))})

    def finish(self, layers: int, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """Notes that so many layers are finished, with both streams' hidden states behind them."""
        if x is not None and y is not None:
            self._save(f"{layers}.states", {"x": x, "y": y}, {})
        try:
            with (self.path / JOURNAL).open("ab") as journal:
                journal.write(b"%d\n" % layers)
                journal.flush()
                os.fsync(journal.fileno())
            (self.path / f"{layers - 1}.states").unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from None
        self.finished = layers

    def load_states(self, layers: int, x: Tensor, y: Tensor) -> None:
        """Fills both streams' hidden states behind so many layers."""
        with self._open(f"{layers}.states") as file:
            for name, states in (("x", x), ("y", y)):
                states.copy_(file.get_tensor(name))

    def rows(self, rows: dict[str, tuple[Rows, ...]]) -> dict[str, tuple[Rows, ...]]:
        """A checkpoint's parameters with what is found here in their place, of the same shapes; it may be found after
        this, but before they are read. What the calibration did not round is the checkpoint's.
        """
        return {name: self._replaced(name, parts) for name, parts in rows.items()}

    def facts(self) -> list[Facts]:
        """Of all experts that are finished, in order."""
        found = []
        for path in self.path.iterdir():
            if re.fullmatch(r"\d+\.\d+", path.name):
                with self._open(path.name) as file:
                    found.append(Facts(**json.loads(file.metadata()["facts"])))
        return sorted(found, key=lambda facts: (facts.layer, facts.expert))

    def remove(self) -> None:
        """Removes the folder, now that the bundle is there; what cannot be removed is named in the log."""
        try:
            _strangers(self.path)
            self._clear()
            self.path.rmdir()
        except (OSError, ExportError) as error:
            logger.warning("%s: is what is left of the calibration, and could not be removed (%s)", self.path, error)

    def _replaced(self, name: str, parts: tuple[Rows, ...]) -> tuple[Rows, ...]:
        layer = LAYER.match(name)
        if name == HEAD:
            return (self._part("head", name, 0, parts[0]),)
        if layer is None:
            return parts
        if name.endswith(ROUTER):
            return (Rows(parts[0].shape, lambda: self._tensors(f"{layer[1]}.router", name)[""]),)
        if name.endswith("_proj.weight"):
            return (self._part(f"{layer[1]}.attention", name, 0, parts[0]),)
        if not name.endswith("_proj"):
            return parts
        each = 2 if name.endswith("gate_up_proj") else 1  # gate and up are apart
        return tuple(
            self._part(f"{layer[1]}.{index // each}", f"{name}.{index // each}", index % each, part)
            for index, part in enumerate(parts)
        )

    def _part(self, file: str, name: str, number: int, part: Rows) -> Rows:
        """The part of that number of a matrix whose parts have as many rows each."""
        first = number * part.shape[0]

        def read() -> Tensor:
            tensors = self._tensors(file, name)
            if not tensors:
                return part.read()
            rows = {kind: tensors[kind][first : first + part.shape[0]] for kind in ("codes", "s", "S")}
            return words(loaded({**tensors, **rows}, part.shape[1]))

        return Rows(part.shape, read)

    def _tensors(self, file: str, parameter: str) -> dict[str, Tensor]:
        """A parameter's tensors by their kind; none where it was not rounded."""
        with self._open(file) as opened:
            names = [name for name in opened.keys() if name.startswith(f"{parameter}:")]  # noqa: SIM118, no dict
            return {name.rpartition(":")[2]: opened.get_tensor(name) for name in names}

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[safe_open]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{self.path / name}: cannot be read ({error}); remove {self.path} and begin anew"
            ) from None

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Writes a file in one step and brings it to the disk."""
        path, draft = self.path / name, self.path / f"{name}{DRAFT}"
        try:
            for old in (path, draft):
                old.unlink(missing_ok=True)
            save_file(tensors, draft, metadata)
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.rename(path)
        except (SafetensorError, OSError) as error:
            raise self._failed(error) from None

    def _clear(self) -> None:
        """Removes all that is an export's, the mark last."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == JOURNAL):
            path.unlink()

    def _failed(self, error: Exception) -> ExportError:
        reason = getattr(error, "strerror", None) or str(error)
        return ExportError(f"{self.path}: the calibration cannot be written ({reason})")


def _strangers(folder: Path) -> None:
    """Raises ExportError where this is there and is not a calibration's, or not all of it."""
    if look(folder) is None:
        return
    if not is_folder(folder):
        raise ExportError(in_the_way(folder))
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) and entry.stat().st_nlink == 1 for entry in entries}
    own = {name for name, plain in found.items() if plain and _OWN.fullmatch(name)}
    mark = (folder / JOURNAL).read_bytes()[: len(MARK)] if JOURNAL in own else b""
    if mark != MARK and not (own == {JOURNAL} and MARK.startswith(mark)):  # a kill may have cut the mark short
        own = set()
    if strangers := sorted(found.keys() - own):
        raise ExportError(in_the_way(folder, strangers))


def _finished(journal: Path, head: bytes) -> int:
    """How many layers a journal with this head says are finished; a kill may have cut its last line short."""
    text = journal.read_bytes() if journal.exists() else b""
    lines = text[: text.rfind(b"\n") + 1].removeprefix(head).splitlines()
    if not text.startswith(head) or lines != [b"%d" % number for number in range(1, len(lines) + 1)]:
        return 0
    return len(lines)
