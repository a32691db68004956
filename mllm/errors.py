"""Typed errors. Each message says what was given, what is allowed, and what to try."""

from __future__ import annotations


class MllmError(Exception):
    """Base of every error a user can cause; the command line prints it without a traceback."""


class ConfigError(MllmError, ValueError):
    """A technique argument or a config file is not valid."""


class ConflictError(MllmError, ValueError):
    """Two techniques, or a technique and the state of the model, exclude each other."""


class LoadError(MllmError, OSError):
    """A model, checkpoint or technique folder cannot be loaded."""


class UnsupportedModelError(MllmError, TypeError):
    """The model, its attention backend or its cache is not one the technique can serve exactly."""


class DidNotFireError(MllmError, RuntimeError):
    """A technique saw visual tokens and did nothing."""


class CacheError(MllmError, RuntimeError):
    """The key/value cache does not fit the run: cropped, of another kind, or filled elsewhere."""


class InputError(MllmError, ValueError):
    """An image, a prompt or a batch cannot be processed."""


class EvalError(MllmError, RuntimeError):
    """The evaluation or its result folder cannot be used."""


class TrainingError(MllmError, RuntimeError):
    """A training run cannot go on."""
