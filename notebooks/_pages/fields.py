"""Parameter tables from what the source says beside its fields, for griffe.

A docstring of this library has lines "name: what it is" for arguments, and fields have comments
`#: what it is` above them. Both become the description in a table of parameters, with the default
from the signature; for a value (a class decorated by `@value`), with those of its bases. Doctests
become code, and the lines between keep their form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import (
    Attribute,
    Class,
    Docstring,
    DocstringParameter,
    DocstringSection,
    DocstringSectionParameters,
    DocstringSectionText,
    Extension,
    Function,
    Module,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

_ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
_BEGINS_REST = (">>>", "Raises", "Source")


class Fields(Extension):
    """See the module."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        del kwargs
        for one in _objects(pkg):
            if isinstance(one, Class):
                for field in one.attributes.values():
                    if not field.is_alias and field.docstring is None:
                        field.docstring = _comment(field)
                for get in list(one.functions.values()):
                    if any(str(d.value) == "attribute" for d in get.decorators):
                        one.set_member(get.name, _property(get))
        for one in _objects(pkg):
            if isinstance(one, Class) and _is_value(one):
                _give_signature(one)
        for one in _objects(pkg):
            if one.docstring is not None:
                # what is shown of a docstring is kept beside its text
                one.docstring.__dict__["parsed"] = list(_sections(one))


def _objects(parent: Object) -> Iterator[Object]:
    for member in list(parent.members.values()):
        if not member.is_alias:
            yield member  # type: ignore[misc]
            if isinstance(member, (Module, Class)):
                yield from _objects(member)
    if isinstance(parent, Module) and parent.parent is None:
        yield parent


def _comment(field: Attribute) -> Docstring | None:
    """The `#:` lines above a field, or the comment beside it."""
    found: list[str] = []
    if not field.lineno or field.parent is None:
        return None
    try:
        path = field.filepath
        lines = field.lines_collection[path]  # type: ignore[index]
    except (KeyError, TypeError):
        return None
    at = field.lineno - 2
    while at >= 0 and lines[at].strip().startswith("#:"):
        found.append(lines[at].strip()[2:].strip())
        at -= 1
    beside = re.search(r"  # (?:type: ignore\[.*?\] # )?(.*)$", lines[field.lineno - 1])
    if not found and beside:
        found = [beside[1]]
    return Docstring(" ".join(reversed(found)), parent=field) if found else None


def _property(get: Function) -> Attribute:
    """What is shown of a method that `attribute` makes a property."""
    made = Attribute(
        get.name, lineno=get.lineno, endlineno=get.endlineno, annotation=get.returns, parent=None
    )
    made.docstring = get.docstring
    made.labels.add("property")
    return made


def _line(one: Class) -> list[Class]:
    """The class and its bases within the package, the furthest first."""
    try:
        bases = one.mro()
    except (ValueError, KeyError):
        bases = []
    return [*reversed(bases), one]


def _is_value(one: Class) -> bool:
    decorated = any(str(d.value).split("(")[0] in ("value", "dataclass") for d in one.decorators)
    tuples = any(str(base) == "NamedTuple" for base in one.bases)
    return (decorated or tuples) and "__init__" not in one.members


def _give_signature(one: Class) -> None:
    """The `__init__` that `@value` or NamedTuple makes."""
    fields: dict[str, Parameter] = {}
    for cls in _line(one):
        for name, field in cls.attributes.items():
            if field.is_alias or name.startswith("_") or "property" in field.labels:
                continue
            own = "" if field.annotation is None else str(field.annotation)
            default = None if field.value is None else str(field.value)
            if not own and name in fields:  # a class that fixes a field's value
                del fields[name]
            if not own or not field.labels & {"instance-attribute"}:  # as of ClassVar
                continue
            only = default is not None and "kw_only=True" in default
            kind = ParameterKind.keyword_only if only else ParameterKind.positional_or_keyword
            fields[name] = Parameter(
                name, annotation=field.annotation, kind=kind, default=_default(default)
            )
    order = sorted(fields.values(), key=lambda p: p.kind is ParameterKind.keyword_only)
    made = Function("__init__", parameters=Parameters(Parameter("self"), *order), lineno=0)
    made.labels.add("dataclass")
    one.set_member("__init__", made)


def _default(value: str | None) -> str | None:
    """What a user reads of `field(default=...)`."""
    if value is None or not value.startswith("field("):
        return value
    given = re.search(r"default=([^,)]+(?:\([^)]*\))?)", value)
    made = re.search(r"default_factory=lambda: (\w+)", value)
    if given:
        return given[1]
    return f"{made[1].strip('_').lower()}()" if made else None


def _described(one: Object) -> dict[str, str]:
    """What the docstrings and comments of an object, and of its bases, say of names."""
    found: dict[str, str] = {}
    for cls in _line(one) if isinstance(one, Class) else [one]:
        if isinstance(cls, Class):
            for name, field in cls.attributes.items():
                if not field.is_alias and field.docstring is not None:
                    found[name] = field.docstring.value
        if cls.docstring is not None:
            for paragraph in _paragraphs(cls.docstring.value, _names(cls)):
                found |= _entries(paragraph, _names(cls))
    return found


def _parameters(one: Object) -> list[Parameter]:
    if isinstance(one, Function):
        given = one
    elif isinstance(one, Class) and isinstance(one.members.get("__init__"), Function):
        given = one.members["__init__"]  # type: ignore[assignment]
    else:
        return []
    return [p for p in given.parameters if p.name not in ("self", "cls") and p.name[0] != "_"]


def _names(one: Object) -> set[str]:
    return {p.name for p in _parameters(one)}


def _paragraphs(text: str, names: set[str]) -> Iterator[list[str]]:
    """The lines of each; what follows entries of these names in one is another."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        ends = [i for i, line in enumerate(lines) if i and line.startswith(_BEGINS_REST)]
        if ends and _entries(lines[: ends[0]], names):
            yield lines[: ends[0]]
            lines = lines[ends[0] :]
        yield lines


def _entries(lines: list[str], names: set[str]) -> dict[str, str]:
    """{name: description} of a paragraph, whose entries may be indented below lines that head
    groups of them; empty where it is none of such lines."""
    found: dict[str, str] = {}
    current: list[str] = []
    grouped = len(lines) > 1 and bool(match := _ENTRY.match(lines[1][4:])) and match[1] in names
    for line in lines:
        if grouped and not line.startswith(" "):
            current = []
            continue
        match = _ENTRY.match(line[4:] if grouped else line)
        if match and any(n in names for n in match[1].split(", ")):
            current = [n for n in match[1].split(", ") if n in names]
            for name in current:
                found[name] = match[2]
        elif current:
            for name in current:
                found[name] += f" {line.strip()}"
        else:
            return {}
    return found


def _sections(one: Object) -> Iterator[DocstringSection]:
    assert one.docstring is not None
    names, described = _names(one), _described(one)
    table = [
        DocstringParameter(
            p.name,
            description=_escaped(described.get(p.name, "")),
            annotation=p.annotation,
            value=None if p.default is None else str(p.default),
        )
        for p in _parameters(one)
    ]
    told = any(p.description for p in table) or isinstance(one, Class)
    before: list[str] = []
    after: list[str] = []
    for lines in _paragraphs(one.docstring.value, names):
        if _entries(lines, names):
            continue
        rest = after or lines[0].strip().startswith(_BEGINS_REST)
        (after if rest else before).append(_markdown(lines))
    if before:
        yield DocstringSectionText("\n\n".join(before))
    if table and told:
        yield DocstringSectionParameters(table)
    if after:
        yield DocstringSectionText("\n\n".join(after))


def _markdown(lines: list[str]) -> str:
    if lines[0].strip().startswith(">>>"):
        return "\n".join(["```pycon", *(line for line in lines), "```"])
    if lines[0].startswith("    "):  # a formula, or code
        return "\n".join(["```text", *(line[4:] for line in lines), "```"])
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in lines)


def _escaped(line: str) -> str:
    """Prose that Markdown would take for tags, links, emphasis or a heading: "<f(u), v>",
    "values[i](step)", "phi*(y)", "#{w}"."""
    line = re.sub(r"^#", "&#35;", line)
    parts = line.split("`")  # code between
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"<(?=\w)", "&lt;", parts[i]).replace("](", "]\\(").replace("*", "\\*")
    return "`".join(parts)
