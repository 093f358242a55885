"""Every exception the package raises on purpose.

    TokenPruneError
    ├── PolicyError (ValueError)        a request names a method, key or value that is not legal
    ├── ConfigurationError (ValueError) the engine cannot be started this way
    ├── VersionError (ImportError)      vLLM is outside the tested range
    ├── InstallationError (RuntimeError) a part of the installation is missing or damaged
    └── DivergenceError (RuntimeError)  scheduler and worker disagree about physical lengths

Messages follow one grammar: *subject* must be *rule*, got *value*; *way out*.
"""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: object) -> str:
    """Return a value as messages show it: whole if it is short, else its beginning and end."""
    return _SHORT.repr(value)


class TokenPruneError(Exception):
    """Base of all errors of this package."""


class PolicyError(TokenPruneError, ValueError):
    """A request asks for something illegal; becomes an HTTP 400.

    Attributes:
        param: Dotted path of the offending key, e.g. `pruning.visual.keep_ratio`.
    """

    def __init__(self, message: str, param: str = "pruning") -> None:
        super().__init__(message)
        self.param = param


class ConfigurationError(TokenPruneError, ValueError):
    """The engine's settings and the plugin do not go together."""


class VersionError(TokenPruneError, ImportError):
    """The installed vLLM is not one this version was tested with."""


class InstallationError(TokenPruneError, RuntimeError):
    """A file of this package is not as it was shipped, or a library of an extra is missing."""


class DivergenceError(TokenPruneError, RuntimeError):
    """Scheduler and worker computed different physical lengths; going on would corrupt KV."""
