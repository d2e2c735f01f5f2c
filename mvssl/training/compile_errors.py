"""Explains failures of torch.compile: recognises them, names the layer being compiled, and suggests a fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from pipelines.c_library import COLOUR, error_line
from pipelines.names import shortened

_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
_NAMED_LAYERS = 3  # named in a message; a fused kernel may hold many
_TOOLS = (  # what the type or text of an exception contains if a tool is missing, and the fix
    ("InvalidCxxCompiler", "Install a C++ compiler (g++), or name one in the variable CXX"),
    ("CppCompileError", "The C++ compiler refuses generated code: install a newer g++, or name another in CXX"),
    ("Failed to find C compiler", "Triton needs a C compiler: install gcc, or name one in the variable CC"),
    ("CalledProcessError", "Triton's C compiler failed: install gcc and Python's headers (python3-dev)"),
    ("TritonMissing", "Install the triton package that this version of torch asks for"),
    ("TritonUnavailableError", "Install the triton package that this version of torch asks for"),
    ("GPUTooOldForTriton", "Triton needs a GPU of compute capability 7.0 or more"),
)
_COMPILER_ERROR = re.compile(r"\b(error|fatal)\s*:", re.IGNORECASE)
_PLACE = re.compile(r"\S+:\d+:(\d+:)? ")  # before what a compiler says, in any language
_OUTPUT = "Output:"  # Inductor's heading of what a compiler wrote
_RAISED = re.compile(r"[\w.]*(Error|Exception|Failure|Failed|Unsupported\w*)\b")  # begins the last line of a traceback
_TRACEBACK = "Traceback (most recent call last)"
_TRITON_PLACE = re.compile(r"\bat \d+:\d+:$")  # ends Triton's headline, which the kernel's source and the reason follow
_HINT = "Set TORCHDYNAMO_VERBOSE"
_OTHERWISE = "This is a bug of torch.compile or an unsupported layer"


def is_compile_error(error: Exception) -> bool:
    """Whether an exception was raised by compilation or by compiled code.

    The backward is compiled when it first runs, and the autograd engine passes its exceptions on unchanged, so the type
    alone does not tell. Running out of memory does not count: an eager step takes even more.
    """
    if isinstance(error, (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)):
        return True
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return any(
        str(frame.f_globals.get("__name__")).startswith(_COMPILERS) for link in _chain(error) for frame in _frames(link)
    )


def describe(error: Exception, modules: Iterable[nn.Module]) -> tuple[str, str]:
    """Where and how compilation failed, and a fix: two sentences without full stops.

    Args:
        error: one for which `is_compile_error` is true.
        modules: the modules whose layers are named.
    """
    text = " ".join(f"{type(link).__name__}: {link}" for link in _chain(error))
    tool = next((remedy for sign, remedy in _TOOLS if sign in text), None)
    where = "" if tool else _place(error, modules)
    return f"{where} ({type(error).__name__}: {shortened(_reason(error), 1000)})".strip(), tool or _OTHERWISE


def _reason(error: Exception) -> str:
    """One line: the headline of an exception, and the line of a compiler's output or traceback that names the error."""
    headline, *rest = _lines(COLOUR.sub("", str(error)).partition(_HINT)[0]) or [""]
    rest += [line for link in _chain(error) for line in _lines(_output(link))]  # of a compiler that was run
    raised = [line for line in rest if _RAISED.match(line)]
    if any(_COMPILER_ERROR.search(line) for line in rest):
        detail = error_line("\n".join(line for line in rest if not _RAISED.match(line)))
    elif rest and any(_TRITON_PLACE.search(line) for line in (headline, *raised)):
        detail = rest[-1]  # what precedes it is the kernel's source
    elif raised and _TRACEBACK in "\n".join(rest):
        detail = raised[-1]
    elif _OUTPUT in rest[:-1]:
        written = rest[rest.index(_OUTPUT) + 1 :]
        detail = next((line for line in written if _PLACE.match(line)), written[-1])
    else:
        return " ".join([headline, *rest[:1]])
    return headline if detail in headline else f"{headline.rstrip(':')}: {detail}"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _output(error: BaseException) -> str:
    """What a program wrote that failed, of `subprocess.CalledProcessError`."""
    texts = (getattr(error, name, None) for name in ("stderr", "output"))
    return "\n".join(text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in texts if text)


def _place(error: Exception, modules: Iterable[nn.Module]) -> str:
    """What was being compiled."""
    backward = "in the backward" if any(f.f_code.co_name == "_engine_run_backward" for f in _frames(error)) else ""
    try:
        layers = _layers(error, modules)
    except Exception:  # this reads torch's internals; its own errors must not hide the failure
        layers = ""
    if not layers:
        return backward
    return f"{backward} of {layers}" if backward else f"in {layers}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it wraps or that preceded it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        inner = getattr(link, "inner_exception", None)  # of torch's BackendCompilerFailed
        waiting += [inner if isinstance(inner, BaseException) else None, link.__cause__, link.__context__]


def _frames(error: BaseException) -> list[FrameType]:
    """The frames of an exception, innermost last."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def _layers(error: BaseException, modules: Iterable[nn.Module]) -> str:
    """The layers whose operations were being compiled, or the traced line of the model; "" if unknown."""
    names = [name for module in modules for name, _ in module.named_modules() if name]
    for link in _chain(error):
        for frame in reversed(_frames(link)):
            found = {_layer(node, names): None for value in frame.f_locals.values() for node in _nodes(value)}
            found.pop("", None)
            if found:
                return ", ".join([*found][:_NAMED_LAYERS]) + (", ..." if len(found) > _NAMED_LAYERS else "")
    traced = next((stack for link in _chain(error) if (stack := getattr(link, "real_stack", None))), None)
    return "" if traced is None else f"{traced[-1].name}, {Path(traced[-1].filename).name} line {traced[-1].lineno}"


def _nodes(value: Any) -> Iterator[Node]:
    """The graph operations in a variable of the compiler: a node, Inductor's buffers, or fused kernels."""
    if isinstance(value, Node):
        yield value
    elif type(value).__module__.startswith("torch._inductor"):
        for buffer in [value, *(getattr(value, "snodes", None) or ())]:
            for holder in (buffer, getattr(buffer, "node", None)):
                yield from (node for node in getattr(holder, "origins", None) or () if isinstance(node, Node))


def _layer(node: Node, names: Iterable[str]) -> str:
    """The layer whose forward or backward has an operation; "" if the graph does not tell."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, kind = [*stack.values()][-1]
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", str(path))
    name = max((name for name in names if path.endswith(f".{name}")), key=len, default="")
    kind = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return f"{name} ({kind})" if name else kind
