"""The errors that end a run. Each message is one line for people."""


def printable(text: str) -> str:
    """Text as one line: line breaks, escape codes and the like are written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(ValueError):
    """The user asked for something that cannot be run; the message is one line for the user."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class BuildError(ConfigError):
    """An error during start-up that a restart may cure."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the older ones are intact."""


class SaveError(RuntimeError):
    """Too many saves in a row failed."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


class BadDataError(RuntimeError):
    """More images are bad than `data.max_bad_fraction` allows."""


class ViewGroupError(RuntimeError):
    """Processes that share the views of an image did not read the same images."""


class MeasurementError(RuntimeError):
    """A method's measurement between epochs failed; raised on all processes."""
