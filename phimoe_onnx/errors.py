"""The errors that phimoe-onnx raises on purpose; a message says what was found, what was expected and what to do."""

from __future__ import annotations

import reprlib


class PhiMoEError(Exception):
    """Base of every error raised on purpose; a command line prints its text and exits with code 1."""


class MissingPackageError(PhiMoEError, ImportError):
    """A package of an extra is not installed."""


class ConfigError(PhiMoEError):
    """config.json is missing, is another model's, or describes a PhiMoE that is not supported."""


class CheckpointError(PhiMoEError):
    """A checkpoint's files or tensors are missing, damaged or misshapen."""


class BundleError(PhiMoEError):
    """A bundle's files are missing, changed, or written by a newer version."""


class GoldenError(PhiMoEError):
    """A golden file is missing, damaged, or another checkpoint's."""


class ExportError(PhiMoEError):
    """An export cannot be done as asked: the output is in the way, cannot be written, or a pass did not apply."""


class DeviceError(PhiMoEError):
    """The asked device or ONNX Runtime release cannot run the bundle."""


class OutOfMemoryError(PhiMoEError, MemoryError):
    """The device has not enough free memory for a bundle, a cache or a pass."""


class GenerationError(PhiMoEError, ValueError):
    """A prompt or an option of `generate` or `score` is out of range."""


class EngineFullError(PhiMoEError):
    """Every slot is taken, and as many requests wait for one as may."""


def brief(value: object) -> str:
    """Whatever was found, for a message; cut where it is long or deep."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} of too many digits"


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
