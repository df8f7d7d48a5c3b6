"""The documents are part of the code: their examples run, their commands exist, their links lead somewhere."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import contrastive
import iotsolve

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```([\w{}-]*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """Code of a page in one language, with the line each block starts at."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def modules():
    for package in (iotsolve, contrastive):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not any(part.startswith("_") for part in found.name.split(".")):
                yield found.name


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, in the order in which they are read."""
    monkeypatch.chdir(tmp_path)
    if page.name in ("coming-from-pot.md", "verify.md"):
        pytest.importorskip("ot")
    names = {"__name__": "__page__"}
    for line, code in blocks(page, "python"):
        # leading newlines make a traceback point at the line of the page
        program = compile("\n" * line + code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, names)


def test_the_pages_have_examples():
    """The test above cannot pass by finding nothing."""
    have = {page.name for page in PAGES if blocks(page, "python")}
    assert have >= {"README.md", "index.md", "quickstart.md", "choosing.md", "coming-from-pot.md", "contrastive.md"}


def commands():
    for page in PAGES:
        for line, text in blocks(page, "console"):
            for shell in re.findall(r"^\$ (.+)$", text, re.MULTILINE):
                yield pytest.param(shell, id=f"{page.name}:{line}:{shell}")


@pytest.mark.parametrize("shell", list(commands()))
def test_commands_exist(shell):
    """Parsed by the command itself, and not run."""
    program, *arguments = shlex.split(shell, comments=True)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program in ("iotsolve", "contrastive"):
        app = importlib.import_module(f"{program}.cli").app
        group = typer.main.get_command(app)
        if not arguments[0].startswith("-"):
            command = group.commands[arguments[0]]
            command.make_context(arguments[0], arguments[1:], resilient_parsing=True)
    else:
        assert program in (".", "pytest", "ruff"), f"{program} is not known to this test"


@pytest.mark.parametrize("name", list(modules()))
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0, report.getvalue()


def public(package):
    return {name: getattr(package, name) for name in package.__all__}


@pytest.mark.parametrize("package", [iotsolve, contrastive], ids=lambda p: p.__name__)
def test_every_public_name_is_documented_with_an_example(package):
    listed = set(re.findall(rf"{package.__name__}\.(\w+)", (DOCS / "api.md").read_text()))
    assert set(package.__all__) <= listed
    without = [
        name
        for name, value in public(package).items()
        if callable(value) and ">>>" not in (value.__doc__ or "") and name not in WITHOUT_EXAMPLE
    ]
    assert not without


# records that are returned rather than made, and shown in the examples of what returns them
WITHOUT_EXAMPLE = {"Certificate", "Potentials", "Solution", "SolveError", "Status"}


def links(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_links_lead_somewhere():
    labels = {label for page in PAGES for label in re.findall(r"^\(([\w-]+)\)=$", page.read_text(), re.MULTILINE)}
    broken = []
    for page in PAGES:
        for link in links(page):
            path, _, label = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            if path and not (page.parent / path).exists():
                broken.append((page.name, link))
            if label and not path and label not in labels:
                broken.append((page.name, link))
    assert not broken


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^[\w-]+$", (DOCS / "index.md").read_text(), re.MULTILINE)) | {"index"}
    assert {page.stem for page in DOCS.glob("*.md")} <= listed


def test_each_paper_is_cited_and_typed_once():
    keys = re.findall(r"^\(([\w-]+)\)=$", (DOCS / "references.md").read_text(), re.MULTILINE)
    cited = {link[1:] for page in DOCS.glob("*.md") for link in links(page) if link.startswith("#")}
    assert len(keys) == len(set(keys)) and not [key for key in keys if key not in cited]


def test_the_documentation_builds_without_a_warning(tmp_path):
    for module in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(module)
    out = [str(DOCS), str(tmp_path / "html"), "-d", str(tmp_path / "trees")]
    call = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", *out]
    built = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "html" / "definitions.html").exists()
