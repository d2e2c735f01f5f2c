"""Reads pickles without running code: what a file names is looked up in a table, all else becomes an inert object."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any


@dataclass(frozen=True)
class Global:
    """A class, function or constant that a pickle refers to, by its dotted name; it is never imported."""

    name: str


@dataclass(eq=False)
class Inert:
    """What a pickle says of an object that is not built.

    Attributes:
        name: dotted name of its class, or of the function that would have been called.
        args: arguments of that call.
        state: attributes that would have been set, mostly a dict; None if there are none.
        pairs: keys and values that would have been set, as in a dict.
        elements: elements that would have been added, as in a list or set.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    elements: list[Any] = field(default_factory=list)


Known = Mapping[str, Callable[..., Any]]


def unpickle(file: IO[bytes], *, known: Known, persistent: Callable[[Any], Any]) -> Any:
    """Read one pickle of any protocol and leave the file after it.

    Args:
        file: at the start of the pickle; needs read, readline and tell.
        known: functions to call for the names that they are given for. Nothing else is called or imported.
        persistent: the object that a persistent id stands for.

    Returns:
        Plain values, what `known` and `persistent` return, and `Global` and `Inert` objects for the rest.

    Raises:
        pickle.UnpicklingError: the pickle is damaged or cut short.
    """
    machine = _Machine(known, persistent)
    try:
        for code, argument, _ in pickletools.genops(file):
            machine.run(code.name, argument)
        return machine.stack.pop()
    except Exception as error:  # a hostile file can cause any of them
        unclear = isinstance(error, (LookupError, TypeError, AttributeError, MemoryError)) or not str(error)
        raise pickle.UnpicklingError("its pickle is damaged" if unclear else str(error)) from error


_DEEPEST_KEY = 20


def hashable(key: Any) -> Any:
    """A key of a dict or element of a set, if it can be hashed: Python overflows its stack in tuples of tuples.

    Raises:
        pickle.UnpicklingError: it is nested too deep.
    """
    level = [key]
    for _ in range(_DEEPEST_KEY):
        level = [part for one in level if isinstance(one, (tuple, frozenset)) for part in one]
        if not level:
            return key
    raise pickle.UnpicklingError("a key of a table is nested too deep")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_IGNORED = frozenset(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine that a pickle is a program for (opcodes: `pickletools`)."""

    def __init__(self, known: Known, persistent: Callable[[Any], Any]) -> None:
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self, code: str, argument: Any) -> None:
        """Execute one opcode."""
        if code in _LITERALS:
            self.stack.append(argument)
        elif code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            self.stack.append(_EMPTY[code]())
        elif code in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if code == "MEMOIZE" else argument] = self.stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif code in _TUPLES:
            count = _TUPLES[code]
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif code not in _IGNORED:
            getattr(self, f"_{code.lower()}")(argument)

    def _pop_mark(self, _: Any = None) -> list[Any]:
        above, self.stack = self.stack, self.marked.pop()
        return above

    def _mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        above = self._pop_mark()
        self.stack.append(tuple(above))

    def _list(self, _: Any) -> None:
        above = self._pop_mark()
        self.stack.append(above)

    def _dict(self, _: Any) -> None:
        above = self._pop_mark()
        self.stack.append({hashable(key): value for key, value in zip(above[::2], above[1::2], strict=True)})

    def _frozenset(self, _: Any) -> None:
        above = self._pop_mark()
        self.stack.append(frozenset(map(hashable, above)))

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, elements: list[Any]) -> None:
        target = self.stack[-1]
        (target.elements if isinstance(target, Inert) else target).extend(elements)

    def _additems(self, _: Any) -> None:
        elements, target = self._pop_mark(), self.stack[-1]
        if isinstance(target, Inert):
            target.elements.extend(elements)
        else:
            target.update(map(hashable, elements))

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([(key, value)])

    def _setitems(self, _: Any) -> None:
        above = self._pop_mark()
        self._update(list(zip(above[::2], above[1::2], strict=True)))

    def _update(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.pairs.extend(pairs)
        else:
            target.update((hashable(key), value) for key, value in pairs)

    def _global(self, argument: str) -> None:
        self.stack.append(Global(argument.replace(" ", ".", 1)))  # module and name

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(f"{module}.{name}"))

    def _ext1(self, argument: int) -> None:
        self.stack.append(Global(f"extension {argument}"))

    _ext2 = _ext4 = _ext1

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        named = self.stack.pop()
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(function, (*arguments, named)))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._pop_mark()
        self.stack.append(self._call(function, tuple(arguments)))

    def _inst(self, argument: str) -> None:
        arguments = tuple(self._pop_mark())
        self._global(argument)
        self.stack.append(self._call(self.stack.pop(), arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        arguments = tuple(arguments)
        if isinstance(function, Global):
            build = self.known.get(function.name)
            return Inert(function.name, arguments) if build is None else build(*arguments)
        return Inert(getattr(function, "name", type(function).__name__), arguments)

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):  # attributes of anything else, such as a state_dict's versions, are not needed
            target.state = state

    def _persid(self, argument: str) -> None:
        self.stack.append(self.persistent(argument))

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _next_buffer(self, _: Any) -> None:
        self.stack.append(Inert("out-of-band buffer"))
