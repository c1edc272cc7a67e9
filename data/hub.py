"""`datasets` as all read through it here: with a quiet terminal, and its errors as one line."""

from types import ModuleType

from data.cli import one_line

NETWORK = ("requests", "httpx", "httpcore", "aiohttp", "urllib3")  # whose errors are those of a connection


def quiet_datasets() -> ModuleType:
    """The package, without bars and log lines, of which each try would be two: errors are raised, once."""
    import datasets  # costs seconds; only those who read through it pay
    import huggingface_hub

    datasets.disable_progress_bars()
    for logging in (datasets.logging, huggingface_hub.logging):
        logging.set_verbosity(logging.CRITICAL)
    return datasets


def failure(where: str, error: Exception) -> ValueError | OSError:
    """What its readers raise, in many classes of their own, as one line; OSError: a connection failed, and
    another start may have more luck."""
    line = f"data.source: {where}: {one_line(error.__cause__ or error)}"
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(NETWORK):
        return OSError(f"{line}; start again when it can be reached, or name a folder with data.source.path")
    return ValueError(line)
