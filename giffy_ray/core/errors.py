"""Errors that the user can fix."""


class InputError(ValueError):
    """Input that cannot be used. The message names the file or argument, the value, and what to do."""


class ConfigError(InputError):
    """An unknown config field or an invalid value. The message names the field and shows the value."""
