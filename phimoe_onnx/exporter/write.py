"""Streams weights into external data files beside the graphs, a job at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import FileIO
from pathlib import Path
from threading import Lock

import onnx_ir as ir
import torch

from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter.staging import Journal
from phimoe_onnx.exporter.weights import Job, Piece, Weight, tensor_bytes

ALIGNMENT = 64  # bytes: a cache line, and what AVX-512 loads
SCALES = re.compile(r"\.scales(\.\d+)?$")  # of a matrix or a stack, or of one expert
FILE_LIMIT = 8 << 30  # bytes after which a new data file begins


class Layout:
    """Where every piece lies: data file and offset, decided before anything is computed, from sizes alone.

    Graphs laid out by the same Layout share pieces, so a second graph over the same weights adds no data. Scales have
    files of their own, whose pages the runtime lets go of when a graph is loaded (runtime/ort/mapped.py).
    """

    def __init__(self, stem: str = "model", file_limit: int = FILE_LIMIT) -> None:
        self.stem = stem
        self.file_limit = file_limit
        self.places: dict[Piece, tuple[str, int]] = {}
        self.sizes: dict[str, int] = {}
        self._open: dict[str, str] = {}  # the last file of each kind

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return sum(self.sizes.values())

    def jobs(self) -> dict[Job, list[tuple[int, str, int]]]:
        """Every job, in file order, with the places of its outputs: index, file, offset."""
        jobs: dict[Job, list[tuple[int, str, int]]] = {}
        for piece, (file, offset) in self.places.items():
            jobs.setdefault(piece.job, []).append((piece.index, file, offset))
        return jobs

    def save(self, model: ir.Model, path: Path) -> None:
        """Writes `model` to `path` with each Weight as external data at its place."""
        computed = [
            (value, value.const_value) for value in _initializers(model) if isinstance(value.const_value, Weight)
        ]
        for value, weight in computed:
            file, offset = self._place(weight)
            value.const_value = ir.ExternalTensor(
                file, offset, weight.nbytes, weight.dtype, shape=weight.shape, name=value.name, base_dir=path.parent
            )
        try:
            ir.save(model, path)
        finally:
            for value, weight in computed:
                value.const_value = weight

    def _place(self, weight: Weight) -> tuple[str, int]:
        first = self.places.get(weight.pieces[0])
        if first is None:
            first = self._append(weight)
        offset = first[1]
        for piece in weight.pieces:
            if self.places[piece] != (first[0], offset):
                raise ExportError(
                    f"{weight.name}: its pieces do not follow each other; this is a bug of phimoe-onnx, please "
                    f"report it"
                )
            offset += piece.nbytes
        return first

    def _append(self, weight: Weight) -> tuple[str, int]:
        stem = f"{self.stem}.scales" if SCALES.search(weight.name) else self.stem
        file = self._open.get(stem, f"{stem}.data")
        start = -(-self.sizes.get(file, 0) // ALIGNMENT) * ALIGNMENT
        if start and start + weight.nbytes > self.file_limit:
            file, start = f"{stem}.{sum(name.startswith(f'{stem}.') for name in self.sizes)}.data", 0
        self._open[stem] = file
        offset = start
        for piece in weight.pieces:
            self.places[piece] = (file, offset)
            offset += piece.nbytes
        self.sizes[file] = offset
        return file, start


def write_weights(layout: Layout, folder: Path, journal: Journal, advance: Callable[[int], None]) -> None:
    """Runs every job of `layout` that the journal does not know and writes its outputs at their places in `folder`.

    A worker per core takes one job at a time, so reading, computing and writing overlap, and memory holds as many jobs
    as there are cores.

    Order: jobs are begun by their layer, within a layer in the order of the files, and a job is begun only when every
    job before it has been begun. So a rounding that needs what the layers before have become (a calibration, say) may
    wait inside its job for theirs: those are done or under way, and none waits for a later one. All other jobs go on
    beside it. What is written does not depend on the order, nor on the number of cores.

    Args:
        advance: called with the number of bytes just written, or found written.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
        CheckpointError: a source tensor cannot be read.
    """
    files: dict[str, DataFile] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cores are busy with a job each
    workers = ThreadPoolExecutor(os.cpu_count())  # begins in the order of submission
    try:
        for name, size in layout.sizes.items():
            files[name] = DataFile(folder / name, size)
        jobs = list(enumerate(layout.jobs().items()))  # the journal's numbers are those of the files' order
        advance(sum(sum(job.nbytes) for number, (job, _) in jobs if number in journal.done))
        running = {
            workers.submit(_write, job, places, files): (number, job)
            for number, (job, places) in sorted(jobs, key=lambda entry: entry[1][0].layer)
            if number not in journal.done
        }
        for future in as_completed(running):
            future.result()
            number, job = running[future]
            journal.add(number)
            advance(sum(job.nbytes))
    except OSError as error:
        raise ExportError(
            f"{folder}: writing the weights failed ({error.strerror}); {layout.nbytes} bytes are needed in all"
        ) from None
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        for file in files.values():
            file.close()


class DataFile:
    """A data file of a known size that several threads write into, on every system."""

    def __init__(self, path: Path, size: int) -> None:
        path.touch()
        self._file = FileIO(path, "r+")
        self._lock = Lock()
        self._file.truncate(size)

    def write(self, data: memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        with self._lock:
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Ends writing."""
        self._file.close()


def _write(job: Job, places: list[tuple[int, str, int]], files: dict[str, DataFile]) -> None:
    outputs = job.run()
    for index, name, offset in places:
        data = tensor_bytes(outputs[index])
        if data.nbytes != job.nbytes[index]:
            raise ExportError(
                f"{name}: a weight has {data.nbytes} bytes, planned were {job.nbytes[index]}; please report it"
            )
        files[name].write(data.data, offset)


def _initializers(model: ir.Model) -> Iterable[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
