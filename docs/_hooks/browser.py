"""The built site in a browser, from the disk: ``python docs/_hooks/browser.py build/site [--out DIR]``.

Every page loads without an error on the console and is no wider than the screen; on the benchmarks page each choice
changes the bars. Pictures of some pages go to ``--out``, to be looked at. Needs playwright and Debian's chromium.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = (1280, 390)
PICTURES = (
    "index",
    "maths/planar_flow",
    "api/functional",
    "benchmarks",
    "gaussian/report",
    "tutorials/hamiltonian_vae",
    "tutorials/zuko",
    "guarantees",
)
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")


def bars(page: Page) -> str:
    """What the benchmarks page shows."""
    return page.locator("#chart-bars").get_attribute("aria-label") or ""


def listen(page: Page, faults: list[str]) -> None:
    """Errors on the console, and of scripts."""
    page.on("console", lambda said: faults.append(f"{page.url}: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))


def choices(page: Page, folder: Path | None, width: int) -> list[str]:
    """Change one control after the other; a fault for each that changes nothing."""
    faults = []
    for name in ("measure", "direction", "size", "run", "op"):
        before, widths = bars(page), page.locator(".charts-bar").evaluate_all("x => x.map(e => e.style.width)")
        page.locator(f"#chart-{name}").select_option(index=1)
        if bars(page) == before or page.locator(".charts-bar").evaluate_all("x => x.map(e => e.style.width)") == widths:
            faults.append(f"benchmarks: choosing another {name} changes no bar")
        if page.locator(".charts-value").evaluate_all("x => x.some(e => e.getBoundingClientRect().right > innerWidth)"):
            faults.append(f"benchmarks: with another {name} a figure leaves the screen")
        if folder and name == "op":
            page.screenshot(path=folder / f"benchmarks-other-{width}.png")
    return faults


def main() -> int:
    """Look at all pages; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    pages = [path for path in sorted(options.site.rglob("*.html")) if path.name != "404.html"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=list(OPTIONS))
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900})
            listen(page, faults)
            for path in pages:
                name = path.relative_to(options.site).with_suffix("").as_posix()
                page.goto(path.resolve().as_uri())
                wide = page.evaluate("document.documentElement.scrollWidth")
                if wide > width:
                    faults.append(f"{name}: {wide} pixels wide on a screen of {width}")
                if options.out and name in PICTURES:
                    page.screenshot(path=options.out / f"{name.replace('/', '-')}-{width}.png")
                if name == "benchmarks":
                    faults += choices(page, options.out, width)
            page.close()
        browser.close()
    good = f"{len(pages)} pages at {WIDTHS} pixels: no error, nothing too wide, every choice counts"
    print("\n".join(faults) or good)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
