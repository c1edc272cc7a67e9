"""What the commands that read a checkpoint have in common: where configs are, and checks of their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parent.parent / "conf"
LATEST = "latest"
Request = TypeVar("Request")


def checked(node: DictConfig, kind: type[Request]) -> Request:
    """The request, a dataclass with the keys `run` and `checkpoint`, that a composed config spells.

    Raises ValueError with one line that begins with the key.
    """
    require_run(node)
    try:
        request: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), node))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    step_of(request.checkpoint)
    return request


def require_run(node: DictConfig) -> None:
    """Raises ValueError where no run is named."""
    if OmegaConf.is_missing(node, "run"):
        raise ValueError("run: must be set to a run's directory, for example run=runs/demo")


def step_of(checkpoint: int | str) -> int | None:
    """The step that the key `checkpoint` asks for; None: the newest. Raises ValueError for other words."""
    if checkpoint == LATEST:
        return None
    if not isinstance(checkpoint, int):
        raise ValueError(f"checkpoint: {checkpoint} is neither a step nor {LATEST}")
    return checkpoint
