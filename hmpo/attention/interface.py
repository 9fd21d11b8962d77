"""The attention function that one module looks up, exchanged for that module alone.

Transformers models look their attention function up by name at every call: in the interface object
of the modeling file, or in that file's own globals ("eager"). Both belong to every model of the
process, so neither is touched. What a module runs instead is its own class's forward pass with
other globals: the same code, in which those two names alone mean something else. It stands in the
module's `__dict__`, where `nn.Module` looks first, and leaves with the last user. Whatever is
registered, patched or configured in transformers meanwhile is found at the next call, as before.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Global of a modeling file: the interface object."""
EAGER = "eager_attention_forward"
"""End of the names of the global functions that "eager" stands for."""
IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that can be intercepted."""
REPLACED = "_hmpo_replaced"
"""Entry of a module's `__dict__`: what stood in the places of what was exchanged."""
COPY_OF = "_hmpo_copy_of"
"""Attribute of a copied forward pass: what it is a copy of."""
Wrap = Callable[[Callable[[], Callable[..., Any]], bool], Callable[..., Any]]
"""(gives the function of the moment, whether it is an eager one) -> what is called instead."""


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's class looks its attention up where it can be intercepted."""
    return _names_interface(_class_forward(module))


def registered_function(module: nn.Module) -> Any:
    """What the module's attention implementation stands for now; None for "eager"."""
    config: Any = module.config
    names = inspect.unwrap(_class_forward(module)).__globals__
    return names[INTERFACE].get(config._attn_implementation)


def intercept(module: nn.Module, wrap: Wrap) -> Callable[[], None]:
    """Let the attention calls of `module` go through `wrap` until released.

    Args:
        module: one that `uses_interface`; any other is left as it is, and so is one whose forward
            pass somebody has replaced by code that does not come to its class's.
        wrap: the same for all users of a module; the first one's counts.

    Returns:
        A function that releases; calling it twice does no harm. The module is held weakly.
    """
    found = _interceptions.get(module)
    if found is None:
        found = _interceptions[module] = _Interception(wrap)
        found.exchange(module)
    found.users += 1
    return _Release(weakref.ref(module), found)


def renew(module: nn.Module) -> None:
    """Intercept once more where somebody has replaced the forward pass since."""
    found = _interceptions.get(module)
    if found is not None and not found.stands(module):
        found.restore(module)
        found.exchange(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody other than `intercept` has replaced the module's forward pass."""
    own = vars(module)
    if "forward" not in own:
        return False
    replaced = own.get(REPLACED, {})
    ours = "forward" in replaced and replaced["forward"] is None and _is_copy(own["forward"])
    return not ours


class _Interception:
    """One module's exchanged forward pass, and how many users need it. It holds no module."""

    def __init__(self, wrap: Wrap) -> None:
        self.users, self.wrap = 0, wrap
        self.original: Any = None
        """The class's forward pass of which a copy runs."""
        self.places: dict[str, weakref.ref[Any]] = {}
        """Entries of the module's `__dict__` that were exchanged, and for what."""

    def exchange(self, module: nn.Module) -> None:
        """Put the copy in the place of every way to the class's forward pass."""
        self.original, self.places = _class_forward(module), {}
        if not uses_interface(module):
            return
        copy, own, before = _exchanged(self.original, self.wrap), vars(module), {}
        for name, value in [*own.items()]:
            new = _leading_to(copy, value, self.original)
            if new is not None:  # a copy of a watched module comes with a copy of the exchange
                stood = not (name == "forward" and _is_copy(value))
                before[name], own[name] = value if stood else None, new
        if "forward" not in own:
            own["forward"] = MethodType(copy, module)
            before["forward"] = None
        own[REPLACED] = before
        self.places = {name: weakref.ref(own[name]) for name in before}

    def stands(self, module: nn.Module) -> bool:
        """Is what was put in place still there, and still the class's forward pass?"""
        own = vars(module)
        kept = all(own.get(name) is new() for name, new in self.places.items())
        return kept and _class_forward(module) is self.original

    def restore(self, module: nn.Module) -> None:
        """Put everything back; a place that somebody took over keeps what is there now."""
        own = vars(module)
        for name, value in own.pop(REPLACED, {}).items():
            new = self.places[name]()
            if own.get(name) is new:
                if value is None:
                    del own[name]
                else:
                    own[name] = value
            for other in [n for n, kept in own.items() if kept is new and new is not None]:
                own[other] = MethodType(self.original, module) if value is None else value


_interceptions: "weakref.WeakKeyDictionary[nn.Module, _Interception]" = weakref.WeakKeyDictionary()


class _Release:
    def __init__(self, module: "weakref.ref[nn.Module]", found: _Interception) -> None:
        self.module, self.found, self.done = module, found, False

    def __call__(self) -> None:
        if self.done:
            return
        self.done = True
        self.found.users -= 1
        module = self.module()
        if self.found.users == 0 and module is not None:
            if _interceptions.get(module) is self.found:
                del _interceptions[module]
            self.found.restore(module)


def _class_forward(module: nn.Module) -> Any:
    return type(module).forward


@functools.cache
def _names_interface(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return INTERFACE in getattr(code, "co_names", ())


def _leading_to(copy: Any, value: Any, original: Any, depth: int = 4) -> Any:
    """`value` with `copy` in the place of `original` where it calls that, else None.

    It may be the bound method, a partial call of it, or a function that has it in its closure, as
    those have that libraries put in the place of a module's forward pass.
    """
    if value is original or (isinstance(value, FunctionType) and _source(value) is original):
        return copy
    if depth == 0:
        return None
    if isinstance(value, MethodType):
        inner = _leading_to(copy, value.__func__, original, depth - 1)
        return None if inner is None else MethodType(inner, value.__self__)
    if isinstance(value, functools.partial):
        inner = _leading_to(copy, value.func, original, depth - 1)
        return None if inner is None else functools.partial(inner, *value.args, **value.keywords)
    if isinstance(value, FunctionType) and value.__closure__:
        held = [c.cell_contents if _is_full(c) else None for c in value.__closure__]
        inner = [_leading_to(copy, content, original, depth - 1) for content in held]
        if any(new is not None for new in inner):
            cells = zip(value.__closure__, inner, strict=True)
            closure = tuple(cell if new is None else CellType(new) for cell, new in cells)
            return _copied(value, value.__globals__, closure)
    return None


def _source(function: Any) -> Any:
    return function.__dict__.get(COPY_OF)


def _is_copy(value: Any) -> bool:
    return isinstance(value, MethodType) and _source(value.__func__) is not None


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


@functools.cache
def _exchanged(function: Any, wrap: Wrap) -> Any:
    """A copy of a forward pass in which attention is looked up in an `_Interface`.

    Decorators are copied along, down to the function that looks attention up.
    """
    inner = inspect.unwrap(function)
    copy = _copied(inner, _names(inner, wrap), inner.__closure__)
    copy.__dict__[COPY_OF] = inner
    if inner is not function:
        copy = _leading_to(copy, function, inner)
    copy.__dict__[COPY_OF] = function
    return copy


def _copied(function: Any, names: dict[str, Any], closure: Any) -> Any:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__, copy.__doc__ = function.__annotations__, function.__doc__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    copy.__dict__.update({k: v for k, v in vars(function).items() if k != "__wrapped__"})
    return copy


def _names(function: Any, wrap: Wrap) -> "_Names":
    """Globals of `function` in which the interface and the eager functions are exchanged."""
    real = function.__globals__
    changed: dict[str, Any] = {INTERFACE: _Interface(real, wrap)}
    for name in function.__code__.co_names:
        if name.endswith(EAGER) and name in real:
            changed[name] = wrap(functools.partial(real.__getitem__, name), True)
    return _Names(real, changed)


class _Names(dict[str, Any]):
    """Globals as they are at each moment, but for a few names.

    Compilers, which copy the storage, look a function's module up by `__name__` and would find
    the file's own globals there: it is left out of the storage.
    """

    def __init__(self, real: dict[str, Any], changed: dict[str, Any]) -> None:
        super().__init__({k: v for k, v in real.items() if k != "__name__"} | changed)
        self.real, self.changed = real, changed

    def __getitem__(self, name: str) -> Any:
        return self.changed[name] if name in self.changed else self.real[name]


class _Interface:
    """Stands for a modeling file's interface object: its functions of the moment, wrapped."""

    def __init__(self, real: dict[str, Any], wrap: Wrap) -> None:
        self._real = real
        self._wrapped = {
            name: wrap(functools.partial(self._registered, name), name == "eager")
            for name in IMPLEMENTATIONS
        }

    def _registered(self, name: str) -> Any:
        return self._real[INTERFACE][name]

    def get_interface(self, name: str, default: Any) -> Any:
        """As transformers' own."""
        found = self._real[INTERFACE].get_interface(name, default)
        return self._wrapped[name] if name in self._wrapped and found is not default else found

    def get(self, name: str, default: Any = None) -> Any:
        """As a mapping's."""
        found = self._real[INTERFACE].get(name, default)
        return self._wrapped[name] if name in self._wrapped and name in self else found

    def __getitem__(self, name: str) -> Any:
        found = self._real[INTERFACE][name]
        return self._wrapped.get(name, found)

    def __contains__(self, name: str) -> bool:
        return name in self._real[INTERFACE]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real[INTERFACE], name)
