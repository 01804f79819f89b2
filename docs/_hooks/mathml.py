"""Formulas as MathML: rendered here, by the browser's own engine there; no script and nothing to fetch."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger("mathml")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace what arithmatex marked."""
    return FORMULA.sub(lambda match: _mathml(match, page.file.src_uri), content)


def _mathml(match: re.Match[str], page: str) -> str:
    latex = html.unescape(match[3]).strip()
    try:
        formula = convert(latex, display="block" if match[2] == "[" else "inline")
    except Exception as error:  # whatever the converter raises, the build says where
        log.warning("%s: formula %r: %s", page, latex, error)
        return match[0]
    alt = html.escape(" ".join(latex.split()), quote=True)
    formula = formula.replace("<math ", f'<math aria-label="{alt}" ', 1)
    return f'<div class="formula">{formula}</div>' if match[2] == "[" else formula
