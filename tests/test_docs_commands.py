"""What a person sees of the commands: each says under --help how it is called, in plain text."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT


def commands() -> list[str]:
    """Modules of the project that a person starts with `python -m` and that take arguments."""
    files = [path for folder in ("benchmarks", "model", "export", "service") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [path for path in files if 'if __name__ == "__main__":' in path.read_text() and re.search(r"parser\(", path.read_text(), re.I)]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def test_there_are_commands() -> None:
    assert {"benchmarks.soak", "model.train", "export.__main__", "service.__main__"} <= set(commands())


@pytest.mark.parametrize("module", commands())
def test_help_says_how_it_is_called_in_plain_text(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("sys.argv", [str(Path(*module.split("."))) + ".py", "--help"])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(module).main()
    assert left.value.code == 0
    page = capsys.readouterr().out
    package, _, name = module.removesuffix(".__main__").rpartition(".")
    assert re.match(rf"usage: python -m (?:{package}\.)?{name} |usage: python -m {package} [a-z-]+ ", page), page.splitlines()[0]
    assert "**" not in page
    assert not re.search(r"^[B-HJ-Z](?:, [B-HJ-Z])* [a-z]+ (?:of|an|a) .*\.$", page, re.MULTILINE), "a legend of shapes is no help"
