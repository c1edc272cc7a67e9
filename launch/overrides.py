"""The command of a study: its own keys, those of its runs, and the overrides that it gives to these."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.request import CONF

Plan = TypeVar("Plan")
PLAIN = re.compile(r"[A-Za-z/][\w./-]*")  # what needs no quotes


def composing() -> AbstractContextManager[object]:
    """A block in which hydra.compose reads conf/, inside of a command of Hydra's too."""
    ours = GlobalHydra.instance().is_initialized()
    return nullcontext() if ours else initialize_config_dir(str(CONF), version_base="1.3")


def as_typed(node: DictConfig, without: Collection[str]) -> list[str]:
    """The overrides with which `python -m train` composes this config of a run; short where our own command's
    choices of groups are known.

    without: top-level keys that are left as they are by default.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    with composing():
        usual = compose("config", return_hydra_config=True).hydra.runtime.choices
        typed = [
            f"{group}={choice}"
            for group, choice in choices.items()
            if group in usual.keys() - without and "/" not in group and choice != usual[group]
        ]
        base = compose("config", overrides=typed)
    before, after = (OmegaConf.to_container(one, resolve=False) for one in (base, node))
    assert isinstance(before, dict) and isinstance(after, dict)
    for key in without:
        after[key] = before[key]
    return typed + list(_changes("", before, after))


def split(node: DictConfig, kind: type[Plan]) -> tuple[Plan, DictConfig]:
    """A composed config's keys of a study, a dataclass, and those of its runs.

    Raises ValueError that names a key with a wrong value.
    """
    keys = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    try:
        schema = OmegaConf.structured(kind)
        for part in (schema, *(schema._get_node(key) for key in keys)):
            OmegaConf.set_readonly(part, False)  # frozen dataclasses make read-only nodes
        plan: Any = OmegaConf.to_object(OmegaConf.merge(schema, {key: node[key] for key in keys}))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    run_node = node.copy()
    OmegaConf.set_struct(run_node, False)
    for key in keys:
        del run_node[key]
    return plan, run_node


def refuse(overrides: Sequence[str], own: Mapping[str, str]) -> None:
    """Raises ValueError where a command line sets a top-level key that the study sets for each of its runs.

    own: such keys, and what to set instead.
    """
    for override in overrides:
        if (part := top(override)) in own:
            key = override.split("=")[0].lstrip("+~")
            raise ValueError(f"{key}: is set by the study for each of its runs; set {own[part]} instead")


def top(override: str) -> str:
    """The top-level key, or the group, that an override is about."""
    return re.split("[=.@]", override.lstrip("+~"))[0]


def exactly(typed: Sequence[str], group: str, choice: str, **settings: Any) -> tuple[str, ...]:
    """The overrides of a run in which a group is this choice as it stands in conf/, whatever `typed`, or an
    experiment in it, says of the group.

    settings: what is other than there, of keys that it has.
    """
    whole = *(one for one in typed if top(one) != group), f"{group}={choice}"
    with composing():
        found = OmegaConf.to_container(compose("config", overrides=list(whole))[group])
    own: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
    own |= {key: value for key, value in settings.items() if key in own}
    assert isinstance(found, dict)
    return *whole, *_changes(f"{group}.", found, own)


def _changes(prefix: str, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[str]:
    """The overrides that make `after` of `before`, which stands at `prefix`."""
    for key in [*before, *(key for key in after if key not in before)]:
        path, old, new = f"{prefix}{key}", before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("_target_") == new.get("_target_"):
            yield from _changes(f"{path}.", old, new)
        elif key in before and key in after and not isinstance(old, dict):
            if old != new:
                yield f"{path}={spelled(new)}"
        else:
            if key in before:
                yield f"~{path}"
            if key in after:
                yield f"+{path}={spelled(new)}"


def spelled(value: Any) -> str:
    """A value of a config in Hydra's grammar of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spelled(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelled, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = PLAIN.fullmatch(value) and value.lower() not in ("true", "false", "null", "nan", "inf")
    return value if plain else QuotedString(value, Quote.double).with_quotes()
