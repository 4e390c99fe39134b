"""Documentation: links that lead somewhere, lines of 100 columns, commands with flags that exist."""

import dataclasses
import re
import shlex

import pytest

from mambahome_jax import cli
from mambahome_jax.recipes import INGREDIENTS, RECIPES, default_of
from tests.conftest import ROOT

PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "kernels/README.md", ROOT / "tests/goldens/README.md"]
)
COLUMNS, README_LINES = 100, 110
KINDS = {"getting-started", "how-to", "reference", "explanation", "experiments"}
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


def test_the_readmes_command_lines_parse():
    lines = re.findall(r"^    mambahome (\w+) (.*)$", _text(ROOT / "README.md").replace("\\\n", " "), re.M)
    parsed = [type(cli.parse(command, shlex.split(words))) for command, words in lines]
    assert parsed == [cli.flags_of(command) for command, _ in lines] and len(lines) >= 8


def test_the_flags_of_command_lines_are_found():
    assert {command for page in PAGES for command, _ in _commands(page)} == {*cli.COMMANDS}


def test_the_pages_are_of_five_kinds_and_the_readme_is_short():
    assert {path.name for path in (ROOT / "docs").iterdir() if path.is_dir()} <= KINDS
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


if __name__ == "__main__":
    print(ingredient_table())
