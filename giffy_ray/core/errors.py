"""Errors that the user can fix."""


class ConfigError(ValueError):
    """An unknown config field or an invalid value. The message names the field and shows the value."""
