"""Documentation: links that lead somewhere, lines of 100 columns, commands with flags that exist."""

import dataclasses
import re
import runpy
import shlex

import pytest

import mambahome_jax as mh
from mambahome_jax import cli
from mambahome_jax.recipes import INGREDIENTS, RECIPES, default_of
from tests.conftest import ROOT

PAGES = sorted(
    [
        *(page for folder in ("docs", "examples") for page in (ROOT / folder).rglob("*.md")),
        *ROOT.glob("*.md"),
        *(ROOT / "kernels/README.md", ROOT / "tests/goldens/README.md"),
    ]
)
COLUMNS, README_LINES = 100, 110
KINDS = {"getting-started", "how-to", "reference", "explanation", "experiments"}
SITE = "_site"  # how the pages become a site
_COMMAND = re.compile(rf"(?:mambahome|python) ({'|'.join(cli.COMMANDS)})(?:\.py)?\b(?! *=)(.*)")


def _text(page) -> str:
    return page.read_text(encoding="utf-8")


def _anchors(page) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _text(page), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', _text(page)))


def _commands(page):
    """(command, its flags) of every command line of a page; a backslash continues a line."""
    for command, words in _COMMAND.findall(_text(page).replace("\\\n", " ")):
        yield command, {word.partition("=")[0].strip("`.,;:)") for word in words.split() if word.startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_page_and_its_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in _anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_repository_that_are_named_exist(page):
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", _text(page)):
        assert (ROOT / name).exists() or (ROOT / "mambahome_jax" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_have_at_most_100_columns_but_in_tables(page):
    long = [line for line in _text(page).splitlines() if len(line) > COLUMNS and not line.lstrip().startswith("|")]
    assert [line for line in long if " " in line.strip()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_command_lines_exist(page):
    for command, words in _commands(page):
        known = {f"--{field.name}" for field in dataclasses.fields(cli.flags_of(command))} | {"--help", "--version"}
        assert words <= known, (command, words - known)


def _typed(page) -> list[tuple[str, list[str]]]:
    """The command lines of a page's indented blocks that leave nothing out, without what a shell does with them."""
    text = re.sub(r"\$\w+", "0", re.sub(r" *\\\n *", " ", _text(page)))
    lines = re.findall(r"^    (?:mambahome|python3?) (\w+)(?:\.py)? +(.*)$", text, re.M)
    words = [(command, shlex.split(re.split(r" [|>&;]|\.\.\.", rest)[0], comments=True)) for command, rest in lines]
    return [(command, each) for command, each in words if command in cli.COMMANDS and "..." not in each]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_parse(page):
    for command, words in _typed(page):
        assert isinstance(cli.parse(command, words), cli.flags_of(command)), words


def test_every_command_and_every_public_name_has_its_place_in_the_reference():
    assert {page.stem for page in (ROOT / "docs/reference/commands").glob("*.md")} == {*cli.COMMANDS, "index"}
    named = re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)", _text(ROOT / "docs/reference/api.md"), re.M)
    assert sorted(named) == sorted(name for name in mh.__all__ if name != "__version__")


def test_the_flags_of_command_lines_are_found():
    assert {command for page in PAGES for command, _ in _commands(page)} == {*cli.COMMANDS}


def test_the_pages_are_of_five_kinds_and_the_readme_is_short():
    assert {path.name for path in (ROOT / "docs").iterdir() if path.is_dir()} <= {*KINDS, SITE}
    assert len(_text(ROOT / "README.md").splitlines()) <= README_LINES


def ingredient_table() -> str:
    """The table of docs/reference/recipes.md, from the fields of the recipes."""
    head = ["flag", *RECIPES, "what it does"]
    rows = [head, ["---"] * len(head)]
    for flag, (_, field) in INGREDIENTS.items():
        rows.append([f"`--{flag}`", *(default_of(flag, recipe) for recipe in RECIPES), field.metadata["help"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_of_ingredients_is_that_of_the_recipes():
    assert ingredient_table() in _text(ROOT / "docs/reference/recipes.md")


def test_the_check_of_the_site_finds_what_leads_nowhere_or_comes_from_the_network(tmp_path):
    check = runpy.run_path(str(ROOT / "docs/_site/check.py"))
    (tmp_path / "other.html").write_text('<h1 id="here">Here</h1>')
    links = ["other.html#here", "https://elsewhere.org", "other.html#there", "nothing.html"]
    (tmp_path / "page.html").write_text(
        "".join(f'<a href="{link}">x</a>' for link in links) + '<script src="https://cdn.org/x.js"></script>'
    )
    faults = [fault.partition("page.html: ")[2] for fault in check["faults_of"](tmp_path)]
    assert faults == [
        "other.html#there leads to no heading",
        "nothing.html leads to no file",
        "loads https://cdn.org/x.js from the network",
    ]


if __name__ == "__main__":
    print(ingredient_table())
