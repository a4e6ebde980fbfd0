"""The errors a user can mend. Each message says what, value, rule and remedy; the command exits with `exit_code`."""


class MegagateError(Exception):
    """Base of every error that is reported as one clean message instead of a traceback."""

    exit_code = 2


class ConfigError(MegagateError):
    """A configuration that cannot be run: unknown key, wrong type, value out of range, or values that do not fit together."""


class DataError(MegagateError):
    """A data set that is missing, damaged, or made for another model."""


class CheckpointError(MegagateError):
    """A checkpoint that is missing, damaged, or of another model."""


class RunError(MegagateError):
    """A run that cannot go on: no space, a folder of another run, a number that is not finite."""


class NotFiniteError(RunError):
    """A training whose loss, gradient or scaled tensor is not finite: its exit code tells it from a mistake."""

    exit_code = 3
