"""What a release needs beside the code: numbers that agree, and files of services that can be read and run here."""

import json
import re
import tomllib

import pytest
import yaml

from mambahome_jax import cli
from mambahome_jax.version import __version__
from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONTAINERS = sorted((ROOT / "containers").iterdir())


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_and_its_names_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (__version__, project()["project"]["license"])
    assert {name["name"] for name in citation["authors"]} == {name["name"] for name in project()["project"]["authors"]}
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" or headings[0] == __version__
    sections = re.findall(r"^### (\w+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert {*sections} <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_there_is(path):
    content = yaml.safe_load(path.read_text())
    assert content["name"] == path.stem and content[True] and content["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for job in content["jobs"].values():
        assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else {*needed} <= {*content["jobs"]}
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step.get("uses", "a/b@c"))
            assert {*re.findall(r"make (\w+)", step.get("run", ""))} <= {*targets}


def test_a_release_is_refused_where_the_repository_is_not_named():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    (guard,) = re.findall(r"! grep -n (\w+) pyproject.toml", workflow)
    assert all(guard in address for address in project()["project"]["urls"].values()) or guard not in str(project())


def test_forms_ask_for_the_version():
    for name in ("bug", "idea"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len({*ids}) == len(ids)
        assert any("mambahome --version --verbose" in field["attributes"].get("label", "") for field in form["body"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "mypy"}


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_containers_copy_what_there_is_and_install_extras_that_there_are(path):
    text = path.read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) + re.findall(r"^    (\S+) /source/", text, re.M)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() and f"!{name}" in ignored, name
    for extras in re.findall(r"\[(\w+(?:,\w+)*)\]", text.split("ENTRYPOINT [")[0]):
        assert {*extras.split(",")} <= {*project()["project"]["optional-dependencies"]}
    for words in re.findall(r'^ENTRYPOINT (\["mambahome", "\w+".*?\])$', text.replace("\\\n", ""), re.M):
        _, command, *flags = json.loads(words) + json.loads(re.findall(r"^CMD (.*)$", text, re.M)[0])
        cli.parse(command, flags)
