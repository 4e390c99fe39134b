"""Check a site that Sphinx wrote: links inside it lead somewhere, and it loads nothing from the network.

python docs/_site/check.py build/docs/html
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Pages that someone new looks for, at most so many clicks from the first one.
CLICKS, FIRST = 2, "docs/index.html"
WANTED = {
    "train on my data": "docs/getting-started/first-dataset.html",
    "use two GPUs": "docs/how-to/clusters.html",
    "what does NSD mean here": "docs/reference/scores.html",
    "load published weights": "docs/how-to/infer.html",
}
_LOADING = {"script", "link", "img", "iframe", "source"}


class Page(HTMLParser):
    """Ids of a page, where its links lead, and what it loads."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        target = found.get("href") or found.get("src")
        if tag == "link" and found.get("rel") not in ("stylesheet", "icon", "preload"):
            target = None
        if target:
            (self.loads if tag in _LOADING else self.links).append(target)


def faults_of(root: Path) -> list[str]:
    """Every link that leads nowhere, and everything that is loaded from elsewhere, with its page."""
    files = [file for file in sorted(root.rglob("*.html")) if "_static" not in file.parts]
    pages = {file.resolve(): Page(file) for file in files}
    faults = []
    for file, page in pages.items():
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    faults.append(f"{file}: loads {target} from the network")
                continue
            place = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not place.exists():
                faults.append(f"{file}: {target} leads to no file")
            elif parts.fragment and place in pages and unquote(parts.fragment) not in pages[place].ids:
                faults.append(f"{file}: {target} leads to no heading")
    return faults


def clicks_to(root: Path) -> dict[str, int]:
    """How many clicks each page is away from the first one, by its path; links of the header and sidebar count."""
    distance, due = {FIRST: 0}, [FIRST]
    for path in due:
        file = root / path
        for target in Page(file).links:
            parts = urlsplit(target)
            place = (file.parent / unquote(parts.path)).resolve()
            if parts.scheme or place.suffix != ".html" or not place.is_relative_to(root.resolve()):
                continue
            name = place.relative_to(root.resolve()).as_posix()
            if name not in distance and place.exists():
                distance[name] = distance[path] + 1
                due.append(name)
    return distance


def main(root: Path) -> int:
    """Print what is wrong; returns the exit code."""
    faults, clicks = faults_of(root), clicks_to(root)
    for question, page in WANTED.items():
        if clicks.get(page, CLICKS + 1) > CLICKS:
            faults.append(f"{root / FIRST}: more than {CLICKS} clicks to {page} ({question})")
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(clicks)} pages, {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
