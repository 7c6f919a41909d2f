"""Errors that the user can fix."""


class ConfigError(ValueError):
    """A field that does not exist or a value that it cannot take; the message names both."""
