"""Errors a user can meet: each one says what was received, what was expected, and the remedy.

Every class is also a standard-library error, so callers may catch either. The command line
turns any `HmpoError` into one line on standard error and exit code 2.
"""

import importlib.util
import math


class HmpoError(Exception):
    """Base of every error that hmpo raises on purpose."""


class ConfigError(HmpoError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class ShapeError(HmpoError, ValueError):
    """A tensor has the wrong shape, dtype or an empty mask."""


class ModelError(HmpoError, ValueError):
    """A policy could not be loaded or does not do what a policy must do."""


class TaskError(HmpoError, ValueError):
    """A task is unknown, misconfigured, or cannot supply the prompts asked for."""


class RewardError(HmpoError, ValueError):
    """A reward function raised, timed out, or returned something unusable."""


class ConversationError(HmpoError, ValueError):
    """An environment or a tool raised, or returned something unusable."""


class EngineError(HmpoError, RuntimeError):
    """A server that draws rollouts is missing, has failed, or does not serve the policy."""


class NonFiniteError(HmpoError, FloatingPointError):
    """NaN or infinity reached a place where it would corrupt the run."""


class CheckpointError(HmpoError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class RankError(HmpoError, RuntimeError):
    """A process of a run over several failed, or is not like the others."""


class RunFolderError(HmpoError, OSError):
    """A run folder exists already, is locked, or cannot be written."""


class StorageError(HmpoError, OSError):
    """The disk is full or a path cannot be written."""


class TelemetryError(HmpoError, ValueError):
    """A telemetry record or log does not follow its schema."""


class StatisticsError(HmpoError, ValueError):
    """Numbers of which no statistic can be made: not finite, too few, of unequal length."""


class MissingDependencyError(HmpoError, ImportError):
    """An optional package is needed; the message gives the pip command."""


def require(condition: bool, name: str, received: object, expected: str) -> None:
    """Raise `ConfigError` in the house's one form unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}: got {received!r}, expected {expected}")


def require_positive(name: str, value: float) -> None:
    """Raise `ConfigError` unless the value is finite and > 0."""
    require(math.isfinite(value) and value > 0, name, value, "a finite number > 0")


def byte_size(count: int) -> str:
    """A number of bytes as it is read: `812 bytes`, `1.4 MB`, `14.9 GB` (decimal units)."""
    if count < 10_000:
        return f"{count} bytes"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    raise AssertionError("some unit fits")


def require_installed(package: str, what: str, extra: str) -> None:
    """Raise `MissingDependencyError` unless an optional package is there; it is not imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(f"{what} needs {package}: pip install 'hmpo[{extra}]'")
