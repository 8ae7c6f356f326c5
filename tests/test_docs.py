"""What the documents name is there: modules, flags, files; what they quote as a message stands in the code."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster_configs/README.md"]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The modules that a text starts with ``python -m``, with their arguments."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for match in re.finditer(r"python3? -m ((?:jobs|serve_app|cluster_configs)[\w.]*)([^\n`]*)", joined):
        arguments = re.split(r"\s[|>&;]|\s#|;|\)", match[2])[0]
        lexer = shlex.shlex(arguments, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.quotes = True, "'\""
        try:
            found.append((match[1].rstrip("."), list(lexer)))
        except ValueError:  # an apostrophe of prose
            found.append((match[1].rstrip("."), arguments.split()))
    return found


def flags(module: str, seen: tuple[str, ...] = ()) -> set[str]:
    """Long flags of the parser of a module, from its source and that of the functions which add to it."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {getattr(node.func, "attr", getattr(node.func, "id", "")) for node in calls}
    found = {"--help"} | {
        argument.value
        for node in calls
        if getattr(node.func, "attr", "") == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")
    }
    if named & {"add_arguments", "run"} and module != "paris_ray.config":
        found |= flags("paris_ray.config")
    return found | ({"--fallback"} if "add_fallback" in named else set())


NAMED = [(path, module, arguments) for path in DOCS for module, arguments in commands(path.read_text())]


def test_documents_name_commands():
    assert len(NAMED) > 30
    assert {"jobs.run_all", "jobs.doctor", "jobs.train_expert", "serve_app.client"} <= {module for _, module, _ in NAMED}


@pytest.mark.parametrize(("path", "module", "arguments"), NAMED, ids=[f"{p.name}-{i}-{m}" for i, (p, m, _) in enumerate(NAMED)])
def test_a_command(path, module, arguments):
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert file.exists() or (file.with_suffix("") / "__main__.py").exists(), f"{path.name}: {module}"
    for one in arguments:
        if one.startswith("--") and len(one) > 2:
            assert one.partition("=")[0] in flags(module), f"{path.name}: {module} {one}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target or target.startswith("#"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve()
        assert file.exists(), f"{path.name}: {target}"
        if anchor and file.suffix == ".md":
            titles = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)", file.read_text(), re.M)}
            assert anchor in titles, f"{path.name}: {target}"


def test_files_in_commands_are_there():
    """Of folders that this project has; what a command makes is elsewhere."""
    found = 0
    for path in DOCS:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S):
            for name in re.findall(r"(?<![\w/.-])((?:docs|cluster_configs|serve_app|jobs|benchmarks)/[\w./-]*\w)", block):
                assert (ROOT / name).exists(), f"{path.name}: {name}"
                found += 1
    assert found > 15


def test_make_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCS:
        for block in re.findall(r"```sh\n(.*?)```|`(make [^`]*)`", path.read_text(), re.S):
            for name in re.findall(r"^make ([a-z]+)", block[0] or block[1], re.M):
                assert name in targets, f"{path.name}: make {name}"


STORES_OWN = ("NO_SUCH_BUCKET", "ACCESS_DENIED", "RequestTimeTooSkewed")


def test_messages_stand_in_the_code():
    table = (ROOT / "docs/operations.md").read_text().partition("## By what it says")[2]
    code = "".join(
        re.sub(r'"\s*\n?\s*f?"', "", file.read_text()) for folder in ("jobs", "paris_ray", "serve_app") for file in (ROOT / folder).rglob("*.py")
    )
    messages = [one for row in re.findall(r"^\| (`.*?`) \|", table, re.M) for one in re.findall(r"`([^`]*)`", row)]
    assert len(messages) > 12
    for message in messages:
        assert message in code or message in STORES_OWN, message
