"""What every command shares: one-line errors, and objects from `_target_` nodes, arguments checked."""

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeGuard, TypeVar

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

P = ParamSpec("P")
R = TypeVar("R")
RESERVED = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
SOURCE = re.compile(r"(?<![\w./-])data\.source(?![\w-])")  # in a message, but not in the name of a file


def main_guard(main: Callable[[], Any]) -> None:
    """Run the main function of a command, usually one decorated with hydra.main, with one_line_errors."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises instead of printing and leaving by itself
    one_line_errors(main)()


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """The function, but an error that the user can cause ends in one line on stderr and exit status 1.

    Such are ValueError, OSError and mistakes in the configuration; anything else is a bug and keeps its
    traceback. Stands below hydra.main too, which prints a line of its own about errors that reach it.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            if os.environ.get("RANK", "0") == "0":  # of several ranks one tells
                print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(1)

    return guarded


def one_line(error: BaseException) -> str:
    """The message of an error as a single line; of Hydra's, what helps."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice; there are {', '.join(error.options)}"
    if isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, ConfigAttributeError):
        return _no_such_key(error.__cause__)
    if isinstance(error, OverrideParseException):
        return f"Error parsing override {error.override!r}: write key=value, braces and blanks in quotes"
    if taken := re.match(r"Could not append to config\. An item is already at '(.*?)'", str(error).strip()):
        return f"{taken[1]}: is set already; leave out the +, and put a value with braces in quotes"
    message = re.sub(r"See https://hydra\S*.*", "", str(error))
    message = re.sub(r"field '\w+' is not Optional", "must not be null; give a value", message)
    return " ".join(message.split()) or type(error).__name__


def _no_such_key(error: ConfigAttributeError) -> str:
    key, full_key = str(error.key), str(error.full_key)
    node = error.parent_node if OmegaConf.is_dict(error.parent_node) else {}
    names = [str(name) for name in node if name not in ("hydra", "_target_")]
    if "_target_" in node:
        names = list(inspect.signature(_locate(node["_target_"], full_key)).parameters)
    if key in names:
        return f"{full_key}: is not set in the YAML; to set it, write +{full_key}=..."
    close = difflib.get_close_matches(key, names, n=1)
    advice = f"there are {', '.join(names)}" if names else f"leave it out, or write +{full_key}=... to add it"
    if close:
        advice = f"did you mean {full_key.removesuffix(key)}{close[0]}?"
    return f"{full_key}: no such key; {advice}"


@contextmanager
def standing_at(key: str) -> Iterator[None]:
    """For work on a source that stands at `key`: its errors then name this key."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not SOURCE.match(str(error)):
            raise
        message = under(key, str(error), None)
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error


def under(key: str, message: str, target: Any) -> str:
    """What an object of class `target` that stands at `key` says, by full keys.

    Sources call themselves data.source, wherever they stand. Other classes name an argument of their own
    alone, as in "workers: 0 is less than 1".
    """
    if SOURCE.match(message):
        return SOURCE.sub(lambda _: key, message)
    named = re.match(r"(\w+)(\.[\w-]+)*: ", message)
    joint = "." if named and target and named[1] in inspect.signature(target).parameters else ": "
    return f"{key}{joint}{message}"


def instantiate(node: Any, key: str, **extra: Any) -> Any:
    """The object that a `_target_` node describes; `extra` are arguments that no configuration holds.

    key: where the node stands in the configuration. Arguments are checked against the signature and its
    simple annotations before anything is called, in nested nodes too. Raises ValueError in one line that
    starts with the key.
    """
    arguments = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not _is_node(arguments):
        raise _no_target(key, arguments)
    arguments = {str(name): value for name, value in arguments.items()}
    _check(arguments, key, set(extra))
    try:
        return hydra_instantiate(arguments, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, ValueError | TypeError | OSError | None):
            raise cause from None
        nested = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
        where = f"{key}.{nested[1]}" if nested else key
        message = one_line(cause or error)
        if SOURCE.match(message) or not message.startswith(key):
            target = re.search(r"call to target '([\w.]+)'", str(error))
            message = under(where, message, _locate(target[1], where) if target else None)
        raise ValueError(message) from error


def _check(node: Mapping[Any, Any], key: str, extra: set[str]) -> None:
    target = _locate(node["_target_"], key)
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(target)
    for name, value in node.items():
        if name in RESERVED:
            continue
        if name not in parameters and not open_ended:
            known = ", ".join(p for p in parameters if p not in extra) or "none"
            raise ValueError(f"{key}.{name}: unknown key; {node['_target_']} knows {known}")
        if value == MISSING:
            raise ValueError(f"{key}.{name}: must be set, for example {key}.{name}=... on the command line")
        if isinstance(value, Mapping):
            _check_within({name: value}, key)
        _check_value(value, hints.get(name, Any), f"{key}.{name}")
    if node.get("_partial_"):
        return
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if not optional and name not in node and name not in extra and "_args_" not in node:
            raise ValueError(f"{key}.{name}: missing; {node['_target_']} needs it")


def _check_within(node: Mapping[Any, Any], key: str) -> None:
    """`_check` of every `_target_` node inside of a plain mapping."""
    for name, value in node.items():
        if _is_node(value):
            _check(value, f"{key}.{name}", set())
        elif isinstance(value, Mapping):
            _check_within(value, f"{key}.{name}")


def _check_value(value: Any, hint: Any, key: str) -> None:
    """Refuse what a simple annotation does not allow; nodes are left to `_check`."""
    if _is_node(value):
        return
    if _is_protocol(hint):
        raise _no_target(key, value)
    if not _fits(value, hint):
        raise ValueError(f"{key}: {value!r} is not {_spelled(hint)}")
    if typing.get_origin(hint) is dict and _is_protocol(typing.get_args(hint)[1]):
        for name, inner in value.items():
            _check_value(inner, typing.get_args(hint)[1], f"{key}.{name}")


def _is_protocol(hint: Any) -> bool:
    return getattr(hint, "_is_protocol", False)


def _is_node(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping) and "_target_" in value


def _no_target(key: str, value: Any) -> ValueError:
    if isinstance(value, Mapping):
        return ValueError(f"{key}: has no _target_ that names a class; set {key}._target_=module.Class")
    return ValueError(
        f"{key}: {value!r} is no node with a _target_; write '{key}={{_target_:module.Class}}', in quotes"
    )


def _locate(path: Any, key: str) -> Callable[..., Any]:
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}._target_: {path} cannot be loaded: {one_line(error)}") from error


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # a class of C code, or names that only a checker sees
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a configuration value can be what a simple annotation says; what is not simple always fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple) or hint in (list, tuple):
        items = [a for a in arguments if a is not ...]
        return isinstance(value, list | tuple) and all(
            not items or any(_fits(item, argument) for argument in items) for item in value
        )
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
