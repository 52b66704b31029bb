"""What a value is, as plain JSON: what two calls of a program can be compared by.

`describe` is for readers and names a function; here a function is its code, its
defaults, and the values that it holds or names in its own module. Functions of
libraries are known by their name and the values that they hold, such as the rate inside
an Optax transformation.
"""

import dataclasses
import functools
import inspect
import sys
import types
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..typing import is_key
from .recorder import describe

_LIBRARIES = sys.stdlib_module_names | {
    "sdegen",
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "equinox",
    "flax",
    "diffrax",
    "jaxtyping",
    "beartype",
}
_SMALL = 64  # arrays of so many numbers are written out, larger ones as a checksum
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)


def identify(value: Any, unknown: set[str] | None = None) -> Any:
    """`value` as plain JSON: equal for values that compute the same.

    **Arguments:**
    - `value`: anything.
    - `unknown`: gets the names of what could not be looked into; none.
    """
    return _Reader(set() if unknown is None else unknown).read(value)


def comparable(held: dict[str, Any], own: dict[str, Any]) -> tuple[Any, Any]:
    """Two identities without the code of functions, where it is of two Pythons."""
    if held.get("python") == own.get("python"):
        return held, own
    return tuple(without_code(one) | {"python": None} for one in (held, own))


def without_code(value: Any) -> Any:
    """An identity without the code of functions and methods, which leaves names."""
    if isinstance(value, list):
        return [without_code(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = (k for k in value if k != "code" and not k.endswith("()"))
    return {k: without_code(value[k]) for k in kept}


def checksum(*parts: Any) -> str:
    """A checksum of the bytes of arrays, or of the text of other values."""
    total = 0
    for part in parts:
        array = isinstance(part, np.ndarray)
        data: Any = np.ascontiguousarray(part) if array else repr(part).encode()
        total = zlib.crc32(data, total)
    return f"{total:08x}"


class _Reader:
    """Reads a value once: what holds itself is named where it comes again."""

    def __init__(self, unknown):
        self.unknown, self.under_way = unknown, set()

    def read(self, value):
        if isinstance(value, np.ndarray | jax.Array):
            return self._array(value)
        if isinstance(value, bytes | complex):
            return repr(value)
        if isinstance(value, type | types.ModuleType):
            return value.__name__
        if isinstance(value, _PLAIN):
            return describe(value)
        if id(value) in self.under_way:
            return "itself"
        self.under_way.add(id(value))
        try:
            return self._inner(value)
        finally:
            self.under_way.discard(id(value))

    def _inner(self, value):
        if isinstance(value, dict):
            return {str(k): self.read(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.read(v) for v in value]
        if isinstance(value, set | frozenset):
            return sorted((self.read(v) for v in value), key=repr)
        if isinstance(value, functools.partial):
            return [self.read(v) for v in (value.func, value.args, value.keywords)]
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            fields = {name: self.read(getattr(value, name)) for name in names}
            return self._code_of_class(value) | fields
        if isinstance(value, types.MethodType):
            return [self.read(value.__self__), self.read(value.__func__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        wrapped = getattr(value, "__wrapped__", None)  # of `jit` and its like
        if wrapped is not None:
            return self.read(wrapped)
        if isinstance(value, types.BuiltinFunctionType | np.ufunc):
            return value.__name__
        if isinstance(value, Iterator):
            self.unknown.add(type(value).__name__)
            return type(value).__name__
        places = jax.tree_util.tree_leaves_with_path(value)
        if not (len(places) == 1 and places[0][1] is value):
            arrays = {jax.tree_util.keystr(k): self.read(leaf) for k, leaf in places}
            return self._code_of_class(value) | arrays
        if getattr(value, "__dict__", None):
            return self._code_of_class(value) | self.read(vars(value))
        name = type(value).__name__
        if callable(value):
            return self._code_of_class(value)
        self.unknown.add(name)
        return name

    def _array(self, value):
        if isinstance(value, jax.Array) and is_key(value):
            value = jax.random.key_data(value)
        if value.size <= _SMALL:
            return describe(value)
        host = np.asarray(value)
        return {"shape": list(host.shape), "crc32": checksum(str(host.dtype), host)}

    def _code_of_class(self, value):
        """The class of a value, with the code of the methods that a user wrote."""
        kind = type(value)
        own = {"class": kind.__name__}
        for name in vars(kind):
            method = getattr(kind, name, None)
            public = name == "__call__" or not name.startswith("__")
            if public and isinstance(method, types.FunctionType):
                if not _of_library(method):
                    own[f"{name}()"] = self.read(method)
        return own

    def _function(self, function):
        if library := _of_library(function):
            function = inspect.unwrap(function)
        held, code = {}, function.__code__
        for name, cell in zip(
            code.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                held[name] = self.read(cell.cell_contents)
            except ValueError:  # a cell that is empty
                held[name] = None
        if library:
            name = function.__qualname__
            return {"function": name, "holds": held} if held else name
        defaults = [function.__defaults__, function.__kwdefaults__]
        for name in set(code.co_names) & function.__globals__.keys():
            value = function.__globals__[name]
            own = isinstance(value, types.FunctionType) and not _of_library(value)
            if own or isinstance(value, (*_PLAIN, np.ndarray, jax.Array, tuple)):
                held[name] = self.read(value)
        return {
            "function": function.__name__,
            "code": checksum(*_parts(code, [function.__doc__])),
            "defaults": [self.read(d) for d in defaults],
            "holds": held,
        }


def _of_library(function):
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _parts(code, texts):
    """What the code of a function computes, without where it stands."""
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant, [])
        elif isinstance(constant, frozenset):
            yield sorted(map(repr, constant))
        elif constant not in texts:
            yield constant
