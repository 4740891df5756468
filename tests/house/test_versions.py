"""The versions that are named hold: ranges of pyproject.toml, requirements.txt, and constraints.txt for all others."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    """{package: version} of a file whose lines are package==version."""
    return {canonical(k): v for k, v in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)}


def needed(names) -> set[str]:
    """The packages that those bring with them, here."""
    found, ahead = set(), list(names)
    while ahead:
        asked = [Requirement(text) for text in importlib.metadata.requires(ahead.pop()) or []]
        new = {canonical(one.name) for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}
        ahead += new - found
        found |= new
    return found


def test_every_range_has_an_upper_bound_and_holds_what_is_pinned():
    extras = PROJECT["optional-dependencies"]
    bounded = PROJECT["dependencies"] + [text for name in extras if name != "dev" for text in extras[name]]
    assert [text for text in [PROJECT["requires-python"], *bounded] if "<" not in text] == []
    direct = pins("requirements.txt")
    asked = [Requirement(text) for text in [*bounded, *extras["dev"]]]
    assert {canonical(one.name) for one in asked} == direct.keys()
    assert [str(one) for one in asked if direct[canonical(one.name)] not in one.specifier] == []


def test_every_package_that_is_installed_is_pinned_in_the_version_that_is_tested():
    """Also those that others bring with them: an exact version of torch alone would be no exact environment."""
    direct, indirect = pins("requirements.txt"), pins("constraints.txt")
    assert not direct.keys() & indirect.keys()
    assert needed(direct) - direct.keys() - indirect.keys() == set()
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in direct.keys() | needed(direct)}
    if any(installed[name] != version for name, version in direct.items()):
        pytest.skip("other versions than those of requirements.txt are installed")
    assert installed == {name: (direct | indirect)[name] for name in installed}


def test_the_citation_and_the_hooks_before_a_commit_are_those_of_the_project():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = re.findall(r"^\t(\.venv/bin/ruff .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [hook["entry"] for hook in hooks] == lines and len(lines) == 2
