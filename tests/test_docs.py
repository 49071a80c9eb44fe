"""docs/options.md says what the code does: every option of every command, every setting of a base, every region.

Tests; no layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from posecrafter_rt.cli.main import COMMANDS, app, load_command
from posecrafter_rt.method.editing import DEFAULT_REGIONS, REGIONS
from posecrafter_rt.models.settings import BaseSettings
from posecrafter_rt.models.sources import EMBEDDED_FOLDER
from posecrafter_rt.runtime.options import MODES

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS = (DOCS / "options.md").read_text(encoding="utf-8")
COMMON = "Of several commands"


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", OPTIONS, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def named_in(text: str) -> set[str]:
    """The options that open a code span: not those within a command line, which may be another's."""
    return set(re.findall(r"`(--[a-z][a-z-]*)", text))


def options_of(command: Any) -> Iterator[str]:
    """The long names of a command's options, and of its subcommands'."""
    for parameter in command.params:
        yield from (name for name in [*parameter.opts, *parameter.secondary_opts] if name.startswith("--"))
    for subcommand in getattr(command, "commands", {}).values():
        yield from options_of(subcommand)


def options_of_all() -> dict[str, set[str]]:
    return {name: set(options_of(load_command(name))) for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_docs_and_none_that_is_not_there(name: str) -> None:
    text = (DOCS / "serve.md").read_text(encoding="utf-8") if name == "serve" else section(f"`{name}`")
    options, told = set(options_of(load_command(name))), named_in(text)
    assert options - told - named_in(section(COMMON)) == set()
    if name != "serve":
        assert told - options == set()


def test_what_several_commands_share_is_there() -> None:
    root = {name for parameter in get_command(app).params for name in parameter.opts if name.startswith("--")}
    every = root.union({"--help"}, *options_of_all().values())
    assert root <= named_in(section(COMMON)) <= every


def test_the_settings_of_a_base_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", section("The settings of a base"), re.MULTILINE)
    paper, embedded = BaseSettings().to_json(), BaseSettings.load(EMBEDDED_FOLDER).to_json()
    assert [name for name, *_ in rows] == [field.name for field in fields(BaseSettings)]
    assert {name: json.loads(value) for name, value, _ in rows} == paper
    assert {name: json.loads(value) for name, _, value in rows} == embedded


def test_modes_and_regions_are_those_of_the_code() -> None:
    text = section("`render`")
    assert re.findall(r"^\| `(\+?\w+)` \|", text[text.index("### The four modes") :], re.MULTILINE) == list(MODES)
    told = re.findall(r"`([a-z_]+)`", text[text.index("### What is moved") :])
    assert sorted(told) == sorted(REGIONS) and tuple(told[:3]) == DEFAULT_REGIONS
