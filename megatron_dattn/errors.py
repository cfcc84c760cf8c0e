"""The errors that a user can cause and mend.

Entry points catch `UserError`, print it as one line and exit with `EXIT_USER_ERROR`; every other
exception is a bug of ours and keeps its traceback. A message names the offending values and the
remedy.
"""

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something outside the program is wrong: a flag, a file, a machine too small."""


class ConfigError(UserError):
    """A configuration value, or a combination of values, that cannot work."""


class DataError(UserError):
    """A data set, a sample or an image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, does not fit, or cannot be written."""
