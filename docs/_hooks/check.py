"""What a strict build does not see, over the built pages: ``python docs/_hooks/check.py build/site``.

One first heading and no level left out; a text for every image; every formula rendered; nothing from another host.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

HEADINGS = {f"h{level}": level for level in range(1, 7)}
#: Elements that load something, and the attribute that says from where.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
#: Relations of a link that only name another page.
NAMES = {"canonical", "prev", "next"}


class Page(HTMLParser):
    """Collects the faults of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.levels: list[int] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Look at one element."""
        values = dict(attributes)
        if tag in HEADINGS:
            self._heading(HEADINGS[tag])
        if tag == "img" and not (values.get("alt") or "").strip():
            self.faults.append(f"image {values.get('src')} has no text")
        if "arithmatex" in (values.get("class") or "").split():
            self.faults.append("a formula is not rendered")
        source = values.get(LOADED.get(tag, "")) or ""
        if source.startswith(("http:", "https:", "//")) and values.get("rel") not in NAMES:
            self.faults.append(f"<{tag}> loads {source}")

    def _heading(self, level: int) -> None:
        last = self.levels[-1] if self.levels else 0
        if level > last + 1:
            self.faults.append(f"heading of level {level} after one of level {last}")
        if level == 1 and 1 in self.levels:
            self.faults.append("two headings of level 1")
        self.levels.append(level)


def faults(html: str) -> list[str]:
    """All of one page's; none of a good one."""
    page = Page()
    page.feed(html)
    return page.faults + ([] if page.levels else ["no heading"])


def main(folder: Path) -> int:
    """Print every fault; the number of them."""
    pages = sorted(path for path in folder.rglob("*.html") if path.name != "404.html")
    found = [f"{path.relative_to(folder)}: {fault}" for path in pages for fault in faults(path.read_text())]
    print("\n".join(found) or f"{len(pages)} pages: headings in order, a text for every image, nothing from elsewhere")
    return len(found) or not pages


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
