"""The contracts in docs/architecture.md, made of the source: signatures and first sentences.

``python -m ideogram4_quant.diagnostics.contracts`` prints them, ``--write`` puts them in the
document. The source is parsed and not imported, so neither a device nor an extra is needed.
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..errors import Ideogram4QuantError
from ..files.new_file import replaced
from .contract_names import CONTRACTS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- contracts: made by `python -m ideogram4_quant.diagnostics.contracts --write` -->"
END = "<!-- end of contracts -->"
_WIDTH = 110

Function = ast.FunctionDef | ast.AsyncFunctionDef


class ContractError(Ideogram4QuantError):
    """A name that the source does not have, or a document without the markers."""


def contracts() -> str:
    """Every name of `contract_names` as Python without bodies, a heading a module."""
    parts = []
    for module, names in CONTRACTS.items():
        tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | Function)}
        lines = [f"# {module}"]
        for name in names:
            if name not in found:
                raise ContractError(
                    f"the contract names {name}, which is not defined there",
                    file=ROOT / module,
                    hint="Rename it in diagnostics/contract_names.py.",
                )
            lines += (
                _class(found[name])
                if isinstance(found[name], ast.ClassDef)
                else _function(found[name])
            )
        parts.append("\n".join(lines))
    return "```python\n" + "\n\n".join(parts) + "\n```\n"


def with_contracts(document: str) -> str:
    """``document`` with what lies between the markers made anew."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ContractError("the markers of the contracts are missing", needed=f"{BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{contracts()}\n{END}{after}"


def _function(node: Function, indent: str = "", *, explained: bool = True) -> list[str]:
    """``def name(arguments) -> result``, and what it promises."""
    is_property = any(ast.unparse(each).endswith("property") for each in node.decorator_list)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if is_property:
        head = f"{indent}{node.name}: {ast.unparse(node.returns) if node.returns else 'Any'}"
    else:
        head = f"{indent}def {node.name}({ast.unparse(node.args)}){result}"
    lines = textwrap.wrap(head, _WIDTH, subsequent_indent=f"{indent}        ")
    return lines + (_promise(node, f"{indent}    ") if explained else [])


def _class(node: ast.ClassDef) -> list[str]:
    """Its bases, promise, fields and public methods."""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"class {node.name}" + (f"({bases})" if bases else "") + ":"]
    lines += _promise(node, "    ")
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
            lines += textwrap.wrap(f"    {ast.unparse(each)}", _WIDTH, subsequent_indent=" " * 8)
        elif isinstance(each, Function) and (
            not each.name.startswith("_") or each.name == "__init__"
        ):
            lines += _function(each, "    ", explained=False)
    return lines


def _promise(node: ast.ClassDef | Function, indent: str) -> list[str]:
    """The docstring's first paragraph up to its first full stop at a line's or sentence's end."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    sentence = text.partition(". ")[0].rstrip(".")
    return textwrap.wrap(
        sentence, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where the names, the source and the document do not fit together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them in docs/architecture.md")
    arguments = parser.parse_args(argv)
    try:
        if arguments.write:
            document = with_contracts(DOCUMENT.read_text(encoding="utf-8"))
            with replaced(DOCUMENT) as part:
                part.write_text(document, encoding="utf-8")
        else:
            print(contracts(), end="")
    except Ideogram4QuantError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
