"""What the docstrings write in reStructuredText, in Markdown: formulas, roles, doctests, simple tables."""

from __future__ import annotations

import logging
import re
import textwrap

import griffe

log = logging.getLogger("mkdocs.plugins.docstrings")
PAGES = ("functional", "nn", "testing")


class Docstrings(griffe.Extension):
    """Translates every docstring before it is parsed, and warns where a public name has none."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for each function, class, attribute and module."""
        if obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Once the package is read."""
        for module in (pkg, *(pkg[name] for name in PAGES if name in pkg.members)):
            for name in module.exports or ():
                member = module.members.get(str(name))
                target = pkg.modules_collection[member.target_path] if member and member.is_alias else member
                if target is not None and not target.is_attribute and not target.has_docstring:
                    log.warning("%s.%s has no docstring", module.path, name)


def translate(text: str) -> str:
    """One docstring."""
    text = _formulas(_doctests(_tables(text)))
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    return re.sub(r":(?:func|class|data|meth):`~?([^`]+)`", _role, text)


def _role(match: re.Match[str]) -> str:
    name = match[1]
    path = f"hvae_kernels.{name}" if name.split(".")[0] in PAGES else name
    return f"[`{name}`][{path}]" if path.startswith("hvae_kernels.") else f"`{name}`"


def _formulas(text: str) -> str:
    """``.. math::`` with an indented block below it."""
    pattern = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?|\n(?=\1 +))+)", re.MULTILINE)

    def replace(match: re.Match[str]) -> str:
        body = " ".join(textwrap.dedent(match[2]).split("\n")).strip()
        return f"{match[1]}\\[{body}\\]\n"

    return pattern.sub(replace, text if text.endswith("\n") else text + "\n")


def _doctests(text: str) -> str:
    """``>>>`` lines become a fenced block of plain Python, as one would paste it."""
    lines, result, block = [*text.split("\n"), ""], [], []
    for line in lines:
        stripped = line.lstrip()
        if stripped.startswith((">>>", "...")) or (block and stripped):
            block.append(line)
            continue
        if block:
            indent = " " * (len(block[0]) - len(block[0].lstrip()))
            result += [f"{indent}```python", *(indent + _statement(x.strip()) for x in block), f"{indent}```"]
            block = []
        result.append(line)
    return "\n".join(result[:-1])


def _statement(line: str) -> str:
    return line[4:] if line.startswith((">>>", "...")) else f"# {line}"


def _tables(text: str) -> str:
    """Simple tables, ruled with ``=`` above and below, and below the header if there is one."""
    ruler, rows = r"\1\2\n", r"((?:\1 *[^=\s].*\n)+)"
    pattern = re.compile(rf"^( *)(=+(?: +=+)+)\n{rows}{ruler}(?:{rows}{ruler})?", re.MULTILINE)

    def cells(block: str, indent: int, columns: list[tuple[int, int | None]]) -> list[list[str]]:
        rows: list[list[str]] = []
        for line in block.rstrip("\n").split("\n"):
            row = [line[indent:][a:b].strip() for a, b in columns]
            if rows and (not row[0] or rows[-1][0].endswith(",")):  # goes on from the line above
                rows[-1] = [f"{before} {more}".strip() for before, more in zip(rows[-1], row, strict=True)]
            else:
                rows.append(row)
        return [[re.sub(r":math:`[^`]+`", _without_bars, cell) for cell in row] for row in rows]

    def replace(match: re.Match[str]) -> str:
        indent, starts = match[1], [found.start() for found in re.finditer("=+", match[2])]
        columns = list(zip(starts, [*starts[1:], None], strict=True))
        header, body = (match[3], match[4]) if match[4] else (None, match[3])
        head = cells(header, len(indent), columns)[0] if header else [""] * len(columns)
        rows = [head, ["---"] * len(columns), *cells(body, len(indent), columns)]
        return "\n".join(f"{indent}| {' | '.join(row)} |" for row in rows) + "\n"

    return pattern.sub(replace, text)


def _without_bars(match: re.Match[str]) -> str:
    return match[0].replace("|", r"\vert ")
