"""The package's own errors."""


class ConfigError(ValueError):
    """The user asked for something that cannot be run; the message is one line for the user."""
