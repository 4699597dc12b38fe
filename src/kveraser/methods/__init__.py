"""Every erasing method, by name. A new one costs a page beside these and one line in `METHODS`."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import fields
from typing import Any

from kveraser.errors import KVEraserError, MethodError
from kveraser.methods.base import Method
from kveraser.methods.blank import Blank
from kveraser.methods.erratum import Erratum
from kveraser.methods.follow import Follow
from kveraser.methods.kveraser import KVEraser, KVEraserRepair
from kveraser.methods.mask import Mask
from kveraser.methods.recompute import Recompute
from kveraser.methods.repair import Repair
from kveraser.methods.selective import Selective
from kveraser.methods.shift import Shift
from kveraser.methods.zero_value import ZeroValue
from kveraser.model.backbone import Backbone

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Recompute, Mask, Shift, ZeroValue, Blank, Repair, Follow, Selective, Erratum, KVEraser, KVEraserRepair,
    )
}  # fmt: skip


def make_method(method: str | Method, **parameters: Any) -> Method:
    """A method from its name and parameters: `make_method("repair", window=16)` or `make_method("repair(16)")`.

    Args:
        method: a name in `METHODS`, with its parameters in parentheses if any (Python literals, positional or by name),
            or a method, returned as it is.
        parameters: parameters by name.

    Raises:
        MethodError: unknown name, unknown parameter, or a value out of range.
    """
    if isinstance(method, Method):
        if parameters:
            raise MethodError(f"parameters {sorted(parameters)} given beside a ready-made {method}: set them in it")
        return method
    match = re.fullmatch(r"\s*([\w+]+)\s*(?:\((.*)\))?\s*", method, re.DOTALL)
    name = match.group(1) if match else method
    if match is None or name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise MethodError(f"no method {name!r}: {hint}")
    chosen = METHODS[name]
    known = [field.name for field in fields(chosen)]  # type: ignore[arg-type]
    try:
        call = ast.parse(f"f({match.group(2) or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        positional = [ast.literal_eval(value) for value in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise MethodError(
            f"{method!r} can't be read: write parameters as in repair(32) or repair(window=32)"
        ) from error
    if len(positional) > len(known):
        raise MethodError(
            f"{method!r} gives {len(positional)} parameters, {name} takes {len(known)}: {', '.join(known)}"
        )
    given = dict(zip(known, positional, strict=False)) | named | parameters
    if len(given) < len(positional) + len(named) + len(parameters):
        raise MethodError(f"{method!r} with {parameters or 'its own names'} gives a parameter twice: give each once")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise MethodError(f"{name} takes no parameter {unknown[0]!r}: it takes {', '.join(known) or 'none'}")
    try:
        return chosen(**given)
    except TypeError as error:
        raise MethodError(f"{method!r}: {error}: check the parameter's type") from error


def default_method(backbone: Backbone) -> Method:
    """What `erase` uses when no method is named: `follow` where keys can be moved, else `recompute`."""
    try:
        return Follow().resolve(backbone)
    except KVEraserError:
        return Recompute()


__all__ = ["METHODS", "Method", "default_method", "make_method"]
