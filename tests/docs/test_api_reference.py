"""docs/api.md repeats the docstrings. ``python tests/docs/test_api_reference.py --write`` makes it anew."""

from __future__ import annotations

import argparse
import ast
import enum
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastmixer
from fastmixer import cli, functional, parity, reference
from fastmixer.ops import torch_ops

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"

INTRODUCTION = """\
# API reference

Made from the docstrings by `python tests/docs/test_api_reference.py --write`; a test holds it to them.

- **Sizes**: B samples, S tokens (patches), C channels, D hidden units of the token MLP, E of the channel MLP;
  T = B S rows.
- **Layout**: activations (B, S, C); linear weights (out, in), as `torch.nn.Linear` keeps them.
- **dtypes**: float16, bfloat16 and float32; float64 in the reference and in Triton's interpreter.
- **Units**: `_ms` at the end of a name means milliseconds; memory is in bytes; an activation is
  B S C elements.
- **Errors**: `TypeError` and `ValueError` say what does not fit, before anything is launched or changed;
  `RuntimeError` where `backend("triton")` cannot run a call.
- **Sources**: the model is [MLP-Mixer](https://arxiv.org/abs/2105.01601); where numbers count as right is
  [`fastmixer.parity`](#fastmixerparity).

Environment variables:

- `FASTMIXER_BACKEND`: the [`backend`](#fastmixerbackend) outside of any block: `auto` (default), `triton` or
  `torch`.
- `FASTMIXER_MEMORY`: the [`memory`](#fastmixermemory) outside of any block: `balanced` (default) or `lean`.
- `FASTMIXER_CACHE_DIR`: the folder of what `tune` measures; by default `$XDG_CACHE_HOME/fastmixer` or
  `~/.cache/fastmixer`.
- `TRITON_INTERPRET`: Triton's own; `1` before Python starts runs the kernels on CPU tensors, slowly.
"""

# What the functions take and give, by module.
TYPES = {
    "blocks.surgery": ("FuseReport", "FuseRow"),
    "checkpoint.load": ("LoadReport",),
    "explain_choices": ("Explanation", "ExplainedBlock", "ExplainedLaunch"),
    "configs": ("Target", "TileConfig", "Library"),
    "ops.layouts": ("Kept",),
    "blocks.layers": ("Mlp",),
}
EXPORTED = [getattr(fastmixer, name) for name in fastmixer.__all__]
MODULES = [functional, reference, parity]
OPERATORS = re.findall(r'"fastmixer::(\w+)"', inspect.getsource(torch_ops))

WIDTH = 100
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
ITEM = re.compile(r"^(\w+(?:, \w+)*): ")
ROLE = re.compile(r":(?:mod|class|meth|func):`([^`]+)`")


# ---- docstrings --------------------------------------------------------------------------------------------


def rendered(doc: str) -> str:
    """A docstring as Markdown: its sections as lists, tables of reStructuredText as they stand."""
    blocks = []
    for block in re.split(r"\n{2,}(?! )", doc):
        head, _, body = block.partition("\n")
        section = SECTION.match(head)
        if section:
            blocks.append(f"**{section[1]}**\n\n{listed(textwrap.dedent(body))}")
        elif head.startswith("==="):
            blocks.append(f"```\n{block}\n```")
        else:
            blocks.append(marked(block))
    return "\n\n".join(blocks)


def listed(body: str) -> str:
    """The items of a section, ``name: text``, as a list; text without a name as it is."""
    if not ITEM.match(body):
        return marked(body)
    lines = []
    for line in body.splitlines():
        item = ITEM.match(line)
        if item:
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            lines.append(f"- {names}: {marked(line[item.end() :])}")
        else:
            lines.append(f"  {marked(line.strip())}")
    return "\n".join(lines)


def marked(text: str) -> str:
    return ROLE.sub(r"`\1`", text).replace("``", "`")


# ---- signatures --------------------------------------------------------------------------------------------


def signature(name: str, function: Callable, *, method: bool = False) -> str:
    """In one line, or with a line for each parameter; a method's, without self, in one."""
    found = inspect.signature(function)
    parameters: list[str] = []
    for parameter in list(found.parameters.values())[method:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        annotation = "" if parameter.annotation is parameter.empty else f": {written(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {value(parameter.default)}"
        parameters.append(f"{stars}{parameter.name}{annotation}{default}")
    gives = inspect.isfunction(function) or inspect.ismethod(function)
    result = f" -> {written(found.return_annotation)}" if gives else ""
    line = f"{name}({', '.join(parameters)}){result}"
    if method or len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])


def written(annotation: object) -> str:
    """An annotation as the source has it: a string, in a NamedTuple's signature wrapped."""
    return getattr(annotation, "__forward_arg__", annotation)


def value(default: object) -> str:
    """A default without what differs from one version to the next."""
    if hasattr(default, "func"):  # a partial
        options = ", ".join(f"{name}={value(given)}" for name, given in default.keywords.items())
        return f"partial({default.func.__name__}, {options})"
    if isinstance(default, torch.dtype):
        return str(default)
    return default.__name__ if isinstance(default, type) else repr(default)


# ---- entries -----------------------------------------------------------------------------------------------


def entry(name: str, thing: object) -> str:
    """The heading, signature and docstring of a function or a class, and the members of the latter."""
    shown = signature(name, thing) if not isinstance(thing, type) else class_line(name, thing)
    text = f"### `{name}`\n\n```\n{shown}\n```\n\n{rendered(inspect.getdoc(thing))}\n"
    if not isinstance(thing, type):
        return text
    members = [member(*pair) for pair in public_members(thing)]
    return "\n".join([text, "**Members**\n", *members]) if members else text


def class_line(name: str, kind: type) -> str:
    if issubclass(kind, enum.Enum):
        return "\n".join(f"{name}.{choice.name} = {choice.value!r}" for choice in kind)
    if issubclass(kind, Exception):  # its signature differs between versions of Python
        return f"class {name}({kind.__base__.__name__})"
    return signature(name, kind)


def public_members(kind: type) -> list[tuple[str, object]]:
    if issubclass(kind, enum.Enum):
        return []
    wanted = (property, classmethod, type(entry))
    return [(n, m) for n, m in vars(kind).items() if not n.startswith("_") and isinstance(m, wanted)]


def member(name: str, thing: object) -> str:
    if isinstance(thing, property):
        shown = f"{name}: {written(thing.fget.__annotations__['return'])}"
    elif isinstance(thing, classmethod):
        shown = signature(name, thing.__func__, method=True)
    else:
        shown = signature(name, thing, method=True)
    return f"- `{shown}`\n\n{textwrap.indent(rendered(inspect.getdoc(thing)), '  ')}\n"


def public_functions(module: ModuleType) -> list[str]:
    """Functions and classes that the module defines."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]


def operator_entries() -> list[str]:
    tree = ast.parse(inspect.getsource(torch_ops))
    docs = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    entries = []
    for name in OPERATORS:
        schema = str(getattr(torch.ops.fastmixer, name).default._schema)
        shown = "\n".join(textwrap.wrap(schema, WIDTH, subsequent_indent="    "))
        entries.append(f"### `fastmixer::{name}`\n\n```\n{shown}\n```\n\n{rendered(docs[name])}\n")
    return entries


# ---- the command line --------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str, argparse.ArgumentParser]]:
    """The name, the line in ``--help`` and the parser of every command."""
    from fastmixer.benchmarks import bench
    from fastmixer.benchmarks.evidence import command

    subparsers = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    lines = {action.dest: action.help for action in subparsers._choices_actions}
    own = {"bench": bench._parser(), "evidence": command._parser()}  # read their own arguments
    return [(name, lines[name], own.get(name, parser)) for name, parser in subparsers.choices.items()]


def command_entry(name: str, line: str, parser: argparse.ArgumentParser) -> str:
    text = f"### `python -m fastmixer {name}`\n\n{plain(parser.description or sentence(line))}\n"
    rows = [option(action) for action in parser._actions if action.dest != "help"]
    return text + ("\n| Option | |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else "")


def sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def option(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else action.dest
    values = "" if action.nargs == 0 or not action.option_strings else f" {metavar(action)}"
    more = " ..." if action.nargs == "+" else ""
    return f"| `{name}{values}{more}` | {plain(action.help)} |"


def metavar(action: argparse.Action) -> str:
    return action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else action.dest.upper())


def plain(text: str) -> str:
    return text.replace("<", "\\<").replace("|", "\\|")


# ---- the page ----------------------------------------------------------------------------------------------


def page() -> str:
    parts = [INTRODUCTION, "## `fastmixer`\n"]
    public = dict(zip(fastmixer.__all__, EXPORTED, strict=True))
    parts += [entry(f"fastmixer.{n}", t) for n, t in public.items() if not isinstance(t, ModuleType)]
    for module in MODULES:
        parts.append(f"## `{module.__name__}`\n\n{rendered(inspect.getdoc(module))}\n")
        parts += [entry(f"{module.__name__}.{n}", getattr(module, n)) for n in public_functions(module)]
    parts.append("## Types\n\nWhat the functions take and give.\n")
    for name, kinds in TYPES.items():
        module = importlib.import_module(f"fastmixer.{name}")
        parts += [entry(f"{module.__name__}.{kind}", getattr(module, kind)) for kind in kinds]
    parts += [f"## Operators\n\n{rendered(inspect.getdoc(torch_ops))}\n", *operator_entries()]
    parts.append(f"## Command line\n\n{rendered(inspect.getdoc(cli).split(chr(10) * 2)[1])}\n")
    parts += [command_entry(*command) for command in commands()]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def headings() -> set[str]:
    return set(re.findall(r"^##+ `(.+)`$", PAGE.read_text(), re.MULTILINE))


# ---- the tests ---------------------------------------------------------------------------------------------


def test_the_page_is_what_the_docstrings_say_today() -> None:
    made, kept = page(), PAGE.read_text()
    assert made == kept, "out of date: run `python tests/docs/test_api_reference.py --write`"


def test_everything_public_is_on_the_page() -> None:
    expected = {f"fastmixer.{name}" for name in fastmixer.__all__}
    expected |= {f"{module.__name__}.{name}" for module in MODULES for name in public_functions(module)}
    expected |= {f"fastmixer::{name}" for name in OPERATORS}
    expected |= {f"python -m fastmixer {name}" for name in (*cli.COMMANDS, "bench", "evidence")}
    assert len(OPERATORS) == 3
    assert expected - headings() == set()


def test_every_type_in_a_signature_is_on_the_page() -> None:
    known = {heading.rpartition(".")[2] for heading in headings()}
    shown = "\n".join(re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    modules = [module for name, module in sys.modules.items() if name.startswith("fastmixer.")]
    ours = {n for m in modules for n, t in vars(m).items() if getattr(t, "__module__", "") == m.__name__}
    assert {name for name in re.findall(r"\b[A-Z]\w+", shown) if name in ours} - known == set()


@pytest.mark.parametrize("name", [n for n in fastmixer.__all__ if inspect.isfunction(getattr(fastmixer, n))])
def test_a_function_says_what_it_takes_and_raises(name: str) -> None:
    function = getattr(fastmixer, name)
    assert "Raises:" in inspect.getdoc(function)
    assert arguments_missing(function) == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_functions_of_modules_name_their_arguments(module: ModuleType) -> None:
    functions = [getattr(module, n) for n in public_functions(module)]
    assert {f.__name__: arguments_missing(f) for f in functions if arguments_missing(f)} == {}


def arguments_missing(thing: Callable) -> list[str]:
    doc = inspect.getdoc(thing)
    return [name for name in inspect.signature(thing).parameters if not re.search(rf"\b{name}\b", doc)]


def test_members_have_docstrings() -> None:
    kinds = [thing for thing in EXPORTED if isinstance(thing, type)]
    for name, found in TYPES.items():
        kinds += [getattr(importlib.import_module(f"fastmixer.{name}"), kind) for kind in found]
    bare = [f"{k.__name__}.{n}" for k in kinds for n, m in public_members(k) if not inspect.getdoc(m)]
    assert bare == []


def test_links_on_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {re.sub(r"[^\w -]", "", line).replace(" ", "-").lower() for line in headings()}
    assert [link for link in re.findall(r"\]\(#([^)]+)\)", text) if link not in anchors] == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}; without it, print")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")
