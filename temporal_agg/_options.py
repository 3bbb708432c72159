"""Options as people give them, by name: checked against the types that a constructor declares."""

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["LARGEST", "check", "check_sizes", "check_types", "checked", "fits"]

Init = TypeVar("Init", bound=Callable[..., None])

LARGEST = 2**16  # of all whole numbers that a model is built with: sizes, widths and counts
_PLURAL = {int: "whole numbers", float: "numbers", str: "strings", bool: "True and False"}
_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}


def check(what: str, build: Callable[..., object], given: Mapping[str, object], reserved: Collection[str] = ()) -> None:
    """Raises an error that names the option, unless ``build`` has all that are given and can take their values.

    Args:
        what: who has the options, for the message.
        build: a class or a function.
        given: values by name.
        reserved: arguments of ``build`` that are no options, which no message lists.

    Raises:
        TypeError: an option that it does not have (the message lists those that it has), or a value of another type.
        ValueError: a number that is not finite.
    """
    parameters = inspect.signature(build).parameters
    if unknown := sorted(given.keys() - parameters.keys()):
        options = [name for name in parameters if name not in reserved]
        raise TypeError(f"{what} has no option {', '.join(unknown)}; it has: {', '.join(options) or 'none'}.")
    check_types(f"{what}: ", build, given)
    for name, value in given.items():
        if isinstance(value, numbers.Real) and not math.isfinite(value):
            raise ValueError(f"{what}: {name} must be a finite number, got {value}.")


def checked(init: Init, but: Collection[str] = ()) -> Init:
    """An ``__init__`` that first raises TypeError where an argument is not of the type that it declares.

    ``but``: arguments that are not looked at.
    """
    signature = inspect.signature(init)
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = [name for name, parameter in signature.parameters.items() if parameter.kind in plain][1:]

    @functools.wraps(init)
    def check_first(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # too many arguments, or too few: ``init`` says so itself
            given = {}
        check_types(
            f"{type(self).__name__}: ", init, {name: given[name] for name in own if name in given and name not in but}
        )
        init(self, *args, **kwargs)

    return check_first  # type: ignore[return-value]


def check_types(where: str, build: Callable[..., object], given: Mapping[str, object]) -> None:
    """Raises TypeError where a value is not of the type that ``build`` declares; what it does not declare may be
    anything. ``where`` stands before the option's name in the message."""
    try:
        hints = get_type_hints(build.__init__ if isinstance(build, type) else build)  # type: ignore[misc]
    except (NameError, TypeError):  # annotations that only type checkers can read, or nothing that has any
        return
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            raise TypeError(
                f"{where}{name} must be {_in_words(hints[name])}, got {value!r:.80} ({type(value).__name__})."
            )


def check_sizes(where: str, given: Mapping[str, object]) -> None:
    """Raises ValueError where a whole number is larger than any size of a model; ``config.json`` refuses it, too."""
    for name, value in given.items():
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"{where}{name} must be at most {LARGEST:,}, got {value}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; lists may stand for tuples, as in JSON and YAML."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if hint is None:
        return value is None
    if hint in (int, float):  # NumPy's numbers, too
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    kind = origin or hint
    if hint is Any or not isinstance(kind, type):
        return True
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(fits(item, one) for item, one in zip(value, args, strict=True))
        return not args or all(fits(item, args[0]) for item in value)
    return isinstance(value, kind)


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if hint in _WORDS:
        return _WORDS[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Sequence):
        if kind is tuple and args and args[-1] is not Ellipsis:
            return f"{len(args)} {_PLURAL.get(args[0], 'values')} in a list"
        return f"a list of {_PLURAL.get(args[0], 'values') if args else 'values'}"
    return f"a {getattr(kind, '__name__', kind)}"
