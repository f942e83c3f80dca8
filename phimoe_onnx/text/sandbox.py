"""The Jinja environment of chat templates: what transformers gives a template, within a budget.

A template is a program of the checkpoint's author and runs in the process that exports or generates. Jinja's sandbox
keeps it from Python's insides, not from looping for hours or building a string of terabytes. Here every turn of a loop,
call, filter and operator is a step, every text that is made costs its characters, and both are counted before the work
is done where the result's size can be told before; what escapes that count is met by the clock between two steps.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 400_000  # one to four seconds; a message of a usual template takes 20
CHARACTERS = 1 << 24  # and COPIES of what the messages have
COPIES = 32
SECONDS = 20.0  # of this thread's processor time
NUMBER = 100_000  # the largest argument of a call or filter, as Jinja's own limit of range()
BITS = 10_000  # of an integer
GROWING = frozenset(  # filters and methods whose result is at most the subject times the greatest argument
    ("center", "expandtabs", "indent", "join", "ljust", "rjust", "string", "tojson", "translate", "wordwrap", "zfill")
)
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{5,}|\*)|\{[^}]*(?:[0-9]{5,}|\{)")  # a long width in a format, or an argument


class Budget:
    """What one rendering or parsing may still spend."""

    def __init__(self, given: Any = ()) -> None:
        self._given: dict[int, Any] = {}  # the caller's own containers, which cost nothing
        self._steps, self._deadline = STEPS, time.thread_time() + SECONDS
        self._characters = CHARACTERS + COPIES * self._know(given)

    def step(self, count: int = 1) -> None:
        """Spends steps."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateError(f"it takes more than {STEPS:,} steps; its loops do not end in time")
        if time.thread_time() > self._deadline:
            raise TemplateError(f"it takes more than {SECONDS:.0f} seconds")

    def text(self, characters: int) -> None:
        """Spends characters."""
        self._characters -= characters
        if self._characters < 0:
            raise TemplateError("it makes a text that is too long")

    def weigh(self, value: Any) -> int:
        """The characters that a value has as text, about; the elements of containers are steps."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            self.step(len(value))
            return 4 + sum(4 + self.weigh(key) + self.weigh(item) for key, item in value.items())
        if isinstance(value, list | tuple | set | frozenset):
            self.step(len(value))
            return 2 + sum(2 + self.weigh(item) for item in value)
        return value.bit_length() // 3 + 1 if isinstance(value, int) else 16

    def elements(self, value: Any) -> None:
        """Spends a step for each element of what the template built, however deep."""
        if id(value) in self._given:
            return
        if isinstance(value, range):
            self.step(len(value))
        elif isinstance(value, Mapping | list | tuple | set | frozenset):
            self.step(len(value))
            for item in value.values() if isinstance(value, Mapping) else value:
                self.elements(item)

    def _know(self, value: Any) -> int:
        """Remembers the containers in `value`; its characters."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, Mapping | list | tuple):
            return 8
        self._given[id(value)] = value
        items = [*value, *value.values()] if isinstance(value, Mapping) else value
        return 8 + sum(map(self._know, items))


BUDGET: ContextVar[Budget] = ContextVar("budget")


def _made(value: Any) -> Any:
    """A value that was just made, paid for."""
    budget = BUDGET.get()
    if isinstance(value, str):
        budget.text(len(value))
    else:
        budget.elements(value)
    return value


def _precheck(name: str, subject: Any, arguments: Iterable[Any]) -> None:
    """Refuses what a filter or method of this name cannot finish in the budget."""
    budget, arguments = BUDGET.get(), list(arguments)
    budget.step()
    for argument in (subject, *arguments):
        budget.elements(argument)
        if isinstance(argument, int) and abs(argument) > NUMBER and argument is not subject:
            raise TemplateError(f"{name}() with {argument:.6g}, more than {NUMBER:,}")
    if isinstance(subject, str) and name in ("format", "format_map") and _WIDE.search(subject):
        raise TemplateError(f"the format {subject[:40]!r} is too wide")
    if isinstance(subject, str) and name == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        budget.text(len(subject) + subject.count(str(arguments[0])) * len(arguments[1]))
    elif name in GROWING:
        sizes = (argument if isinstance(argument, int) else budget.weigh(argument) for argument in arguments)
        budget.text(budget.weigh(subject) * max(1, *sizes, 1))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the budget; where it wants the context first, as its marks say."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def filter(*arguments: Any, **named: Any) -> Any:
        subject, *rest = arguments[first:]
        _precheck(name, subject, [*rest, *named.values()])
        return _made(function(*arguments, **named))

    return filter


def _turns(values: Iterable[Any]) -> Iterator[Any]:
    """The turns of a loop, each a step; what it hands on is known to be small enough."""
    budget = BUDGET.get()
    for value in values:
        budget.step()
        budget.elements(value)
        yield value


def _concat(parts: Iterable[Any]) -> str:
    """What a template, a macro or a block of text put out, paid for before it is joined."""
    budget, texts = BUDGET.get(), []
    for part in parts:
        budget.text(len(part))
        texts.append(part)
    return "".join(texts)


def _output(value: Any) -> Any:
    """A value that is about to be written as text."""
    if not isinstance(value, str):
        BUDGET.get().text(BUDGET.get().weigh(value))
    return value


def _tilde(values: Iterable[Any]) -> str:
    return _concat(str(_output(value)) for value in values)


class _Charge(NodeTransformer):
    """Leads what a template binds and joins through the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter("_turns", node.iter)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = _filter("_made", node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.With:
        self.generic_visit(node)
        node.values = [_filter("_made", value) for value in node.values]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("_tilde", nodes.List(node.nodes, lineno=node.lineno))


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The block `{% generation %}`, by which trainers find the assistant's part; here its body alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it for instances

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates (its options, filters and functions), every operation counted."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=_output,
            cache_size=0,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_turns": _turns, "_made": _made, "_tilde": _tilde}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # random text, as much as is asked for

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Charge().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Context, called: Any, /, *arguments: Any, **named: Any) -> Any:
        """Calls a function, method or macro."""
        name = getattr(called, "__name__", None) or getattr(called, "name", "")
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        _precheck(str(name), getattr(method, "__self__", None), [*arguments, *named.values()])
        return _made(super().call(context, called, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator of arithmetic."""
        budget = BUDGET.get()
        budget.step()
        if operator == "*" and isinstance(left, int) and not isinstance(right, int):
            left, right = right, left
        if operator == "*" and isinstance(left, str | bytes | list | tuple) and isinstance(right, int):
            (budget.text if isinstance(left, str | bytes) else budget.step)(len(left) * max(right, 0))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            grown = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if grown > BITS:
                raise TemplateError(f"it computes a number of more than {BITS:,} bits")
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TemplateError(f"the format {left[:40]!r} is too wide")
        elif operator in ("+", "%") and isinstance(left, str):
            budget.text(len(left) + budget.weigh(right))
        elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            budget.step(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
