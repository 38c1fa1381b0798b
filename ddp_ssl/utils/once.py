"""A message that is logged once."""

import functools
import logging

logger = logging.getLogger("ddp_ssl")


@functools.cache
def warn_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message, once in the life of this process."""
    logger.log(level, "%s", message)
