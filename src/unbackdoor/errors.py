"""The errors of this package: one small tree, so that callers can catch what they can mend.

Every message is one sentence that says what is wrong, with the values, and what to do.
"""

from __future__ import annotations


class UnbackdoorError(Exception):
    """Base of all errors that are raised on purpose; the command line prints them without a traceback."""


class InvalidInputError(UnbackdoorError, ValueError):
    """An argument, option or data set is outside what the operation is defined for."""


class UnsupportedModelError(UnbackdoorError):
    """The network has a structure, or a state, that the operation cannot treat."""


class UnsafeFileError(UnbackdoorError):
    """A file was refused before anything in it was executed or trusted."""


class MismatchedCheckpointError(UnbackdoorError):
    """The tensors of a checkpoint do not fit the architecture that was named."""


class MissingDependencyError(UnbackdoorError, ImportError):
    """An optional package is needed and absent."""
