"""LoRA adapters, as peft writes them, merged into the weights while these are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimoe_onnx.checkpoint.headers import DTYPES, Stored, read_header
from phimoe_onnx.checkpoint.rows import Rows
from phimoe_onnx.errors import CheckpointError, ConfigError, brief
from phimoe_onnx.files import read_json

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Of adapter_config.json's keys those that the merge reads, and those that say how the adapter was trained; any other
# that is set changes what the adapter means.
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"}
TRAINING = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "megatron_core", "eva_config", "runtime_config", "qalora_group_size"),
}
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base weights as well
LOW_RANK = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to the weights of a model.

    Attributes:
        folder: where it lies.
        deltas: of each low-rank module, by its parameter's name, what it adds.
        saved: of each parameter that was trained whole, its tensor.
    """

    folder: Path
    deltas: dict[str, Delta]
    saved: dict[str, Whole]

    def merged(self, parameter: str, rows: Rows) -> Rows:
        """The rows of one matrix or vector with the adapter in them, in the dtype that they have without it."""
        for change in (self.saved.get(parameter), self.deltas.get(parameter)):
            if change is None:
                continue
            if change.shape != rows.shape:
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: is for a {parameter} of the shape {list(change.shape)}, the model's has "
                    f"{list(rows.shape)}; give the adapter's own base model ({CONFIG} names it)"
                )
            rows = change.applied(rows)
        return rows

    @property
    def files(self) -> tuple[Path, Path]:
        """Those that say what it does."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def touches(self, *parameters: str) -> bool:
        """Whether it changes one of the parameters."""
        return any(name in self.deltas or name in self.saved for name in parameters)

    def check_used(self, parameters: Iterable[str]) -> None:
        """Raises CheckpointError where the adapter changes something that is none of the `parameters`."""
        if unknown := sorted((self.deltas.keys() | self.saved.keys()) - set(parameters)):
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: changes {unknown[0]} ({len(unknown)} such), which the model has not; "
                f"give the adapter's own base model ({CONFIG} names it)"
            )


@dataclass(frozen=True)
class Delta:
    """B [N, r] times A [r, K] times `scaling`; for an embedding [V, H] transposed, from B [H, r] and A [r, V]."""

    a: Stored
    b: Stored
    names: tuple[str, str]
    scaling: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.embedding else shape

    def applied(self, rows: Rows) -> Rows:
        """The rows with the product added."""
        return Rows(rows.shape, lambda: self._added(rows.read()))

    def _added(self, base: torch.Tensor) -> torch.Tensor:
        """As peft's merge computes it: in float32, in which it keeps an adapter, then in the dtype of the base."""
        a, b = (_read(stored.file, name).float() for stored, name in zip((self.a, self.b), self.names, strict=True))
        if self.embedding:
            return base + ((b @ a).T * self.scaling).to(base.dtype)
        return (base.float() + (b @ a) * self.scaling).to(base.dtype)


@dataclass(frozen=True)
class Whole:
    """A parameter that takes the place of the base's.

    These are peft's modules_to_save, and the base of an embedding or a head with low-rank factors, which it saves, too.
    """

    tensor: Stored
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return self.tensor.shape

    def applied(self, rows: Rows) -> Rows:
        """The parameter in the dtype of the rows, which it replaces."""
        return Rows(rows.shape, lambda: self._read(rows.read().dtype))

    def _read(self, dtype: torch.dtype) -> torch.Tensor:
        return _read(self.tensor.file, self.name).to(dtype)


def _read(file: Path, tensor: str) -> torch.Tensor:
    from phimoe_onnx.checkpoint.data import is_finite, read_tensor  # needs torch, which the headers do not

    numbers = read_tensor(file, tensor, None)
    if not is_finite(numbers):
        raise CheckpointError(f"{file}: {tensor} holds numbers that are not finite (NaN or infinity)")
    return numbers


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError where an adapter lies in a checkpoint's folder: nobody can tell which model is meant."""
    if not (folder / CONFIG).exists():
        return
    if (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder / CONFIG}: an adapter lies beside the weights; move it to a folder of its own, and give that as "
            f"--adapter if it is to be merged"
        )
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"{folder}: is an adapter{of} and no model; export that model, with this folder as its --adapter"
    )


def read_adapter(folder: Path) -> Adapter:
    """Reads and checks the adapter in `folder`; its numbers are read when they are needed.

    Raises:
        ConfigError: adapter_config.json is missing, damaged, or asks for something that is not merged.
        CheckpointError: adapter_model.safetensors is missing or damaged, or does not fit adapter_config.json.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    _check(config, where)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder / WEIGHTS}: no such file; only adapters in safetensors are read")
    stored = read_header(folder / WEIGHTS)
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    saved = {}
    for name, entry in stored.items():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.file}: {name} is stored as {brief(entry.dtype)}, expected one of {', '.join(DTYPES)}"
            )
        path = _model_path(name)
        if match := LOW_RANK.fullmatch(path):
            factors.setdefault((match[1], match[2] is not None), {})[match[3]] = name
        elif ".lora_" in path:
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is of a kind that is not merged")
        else:
            saved[re.sub(r"\b(modules_to_save\.(default\.)?|base_layer\.)", "", path)] = Whole(stored[name], name)
    deltas = {
        f"{module}.weight": _delta(module, embedding, names, stored, config, folder)
        for (module, embedding), names in factors.items()
    }
    return Adapter(folder, deltas, saved)


def _model_path(name: str) -> str:
    """The name of a tensor's module as a model with a head has it."""
    path = name.removeprefix(PREFIX)
    return path if path.startswith(("model.", "lm_head.", "score.")) else f"model.{path}"


def _check(config: dict[str, Any], where: str) -> None:
    """Raises ConfigError for what is not merged, by its name."""
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type is {brief(config.get('peft_type'))}, expected 'LORA'")
    for key, value in config.items():
        if key not in READ | TRAINING and value not in (None, False, [], {}):
            raise ConfigError(
                f"{where}: {key} is {brief(value)}, which is not merged; merge the adapter with peft "
                f"(merge_and_unload), save the model and export that"
            )
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{where}: bias is {brief(config['bias'])}, expected 'none'; others are not merged")
    if not any(config.get("init_lora_weights") is known or config["init_lora_weights"] == known for known in INITIAL):
        raise ConfigError(
            f"{where}: init_lora_weights is {brief(config['init_lora_weights'])}, which changes the base weights and "
            f"is not merged; convert the adapter with peft (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ConfigError(f"{where}: {key} is {brief(config[key])}, expected an object")


def _delta(
    module: str, embedding: bool, names: dict[str, str], stored: dict[str, Stored], config: dict[str, Any], folder: Path
) -> Delta:
    if names.keys() != {"A", "B"}:
        raise CheckpointError(f"{folder / WEIGHTS}: has {next(iter(names.values()))} alone, without its other factor")
    a, b = stored[names["A"]], stored[names["B"]]
    rank = _of(module, "rank_pattern", "r", config, folder)
    alpha = _of(module, "alpha_pattern", "lora_alpha", config, folder)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {names['A']} and {names['B']} have the shapes {list(a.shape)} and {list(b.shape)}, "
            f"{CONFIG} makes their rank {rank:g}"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Delta(a, b, (names["A"], names["B"]), scaling, embedding)


def _of(module: str, pattern: str, otherwise: str, config: dict[str, Any], folder: Path) -> float:
    """The rank or alpha of a module: of the first pattern that is its name or the end of it, as peft matches them."""
    patterns = config.get(pattern) or {}
    try:
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    except re.error as error:
        raise ConfigError(f"{folder / CONFIG}: {pattern} holds a pattern that cannot be read ({error})") from None
    value = config.get(otherwise, 8) if key is None else patterns[key]
    if type(value) not in (int, float) or not 0 < value < 2**31:
        raise ConfigError(
            f"{folder / CONFIG}: {otherwise if key is None else pattern} is {brief(value)}, expected a positive number"
        )
    return float(value)
