"""Warnings that are said once, however many objects have the same setting."""

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this very message was logged in this process."""
    logger.warning(message)
