"""What all tests share: golden files, and which cases of a test are of the quick tier."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import pytest
import tiers
from hypothesis import settings

# What is drawn is the same in every run of a version, so that a failure is a change's and not the day's: the error
# rule compares largest errors, and among thousands of drawn calls one may pass its bound by a hair.
# HYPOTHESIS_PROFILE=explore draws anew.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


class Golden(Protocol):
    """Compares a text with the file that holds what it should be."""

    def __call__(self, path: Path, text: str) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    tiers.quick = "not slow" in config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the quick cases of a test that is marked `representative(n)`, all but n go to the long tier. Which ones stay
    is drawn, and always the same: cases that follow one another have much in common."""
    cases: defaultdict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("representative")
        if marker is not None and item.get_closest_marker("slow") is None:
            cases[item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for (_, count), quick in cases.items():
        quick.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        for item in quick[count:]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(path, text)`: the text is that of the file, or becomes it under `--update-golden`."""
    update = request.config.getoption("--update-golden")

    def check(path: Path, text: str) -> None:
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; write it with --update-golden and read what it says"
        assert text == path.read_text(encoding="utf-8")

    return check
