"""English prose that is on every machine with jax: the text the embedded model is trained on.

Sources: of CPython's standard library (PSF License, `LICENSE.txt` beside it) `pydoc_data.topics`
(the language reference), the docstrings and block comments of every module, the docstrings of the
compiled modules, and IDLE's help and news; and the docstrings and block comments of `PACKAGES`.
Code, doctests and tables are dropped; wrapped lines are joined, so a paragraph is one line. Every
paragraph is kept once, in the first document that has it, so no held-back paragraph is also trained
on.
"""

import ast
import html
import importlib.util
import inspect
import pkgutil
import re
import sys
import sysconfig
import textwrap
import tokenize
import types
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

# Their licences. Never held back: held-back text is CPython's alone.
PACKAGES = {
    "numpy": "BSD-3-Clause",
    "jax": "Apache-2.0",
    "flax": "Apache-2.0",
}

# Folders that hold tests, generated tables, or text that is not English prose.
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "_vendored",
    "site-packages",
    "dist-packages",
    "encodings",
    "__pycache__",
}

_SENTENCE_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can do does for from has have if in into is it its may "
        "must no not of on only or other should so than that the then there these they this to "
        "used using was when where which will with would you your",
    )
)


def documents() -> dict[str, list[str]]:
    """Document name -> its paragraphs, in a fixed order; no paragraph occurs twice."""
    seen: set[str] = set()
    result: dict[str, list[str]] = {}
    for name, texts in _sources():
        kept = []
        for text in texts:
            for paragraph in paragraphs(text):
                key = re.sub(r"\W+", " ", paragraph).lower()
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
        if sum(map(len, kept)) >= 200:
            result[name] = kept
    return result


def split(held_back: int = 12) -> tuple[list[str], list[str]]:
    """(training, held-back) documents: about one in `held_back` of CPython's is held back.

    The choice depends on the document's name alone, so it is the same on every machine.
    """
    train, held = [], []
    for name, kept in documents().items():
        chosen = not name.startswith("package") and zlib.crc32(name.encode()) % held_back == 0
        side = held if chosen else train
        side.append("\n\n".join(kept))
    return train, held


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text` that read as prose, each joined into one line."""
    result = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text.expandtabs())):
        lines = block.splitlines()
        if any(line.lstrip().startswith((">>>", "...", "$ ", "% ")) for line in lines):
            continue
        for item in _items(lines):
            if _is_prose(item):
                result.append(item)
    return result


def _items(lines: list[str]) -> Iterator[str]:
    """Joins wrapped lines; a bullet starts a new item."""
    item: list[str] = []
    for line in lines:
        line = line.strip()
        bullet = re.match(r"([-*+•]|\d+[.)])\s+", line)
        if bullet and item:
            yield _clean(" ".join(item))
            item = []
        item.append(line)
    if item:
        yield _clean(" ".join(item))


def _clean(text: str) -> str:
    text = re.sub(r":[a-z:]+:`([^`]*)`", r"\1", text)  # Sphinx roles
    text = text.replace("``", "`").replace("\u2019", "'").replace("\u201c", '"')
    text = text.replace("\u201d", '"').replace("\u2014", "--").replace("\u2013", "-")
    text = re.sub(r"^([-*+•])\s+", "- ", text)
    return re.sub(r"\s+", " ", text).strip()


def _is_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 6 or not text.isascii() or not re.search(r"[.:!?)]$", text):
        return False
    if "----" in text:  # a section of parameters
        return False
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    common = sum(word.lower() in _SENTENCE_WORDS for word in words) / len(words)
    return letters > 0.85 and common > 0.18


def _sources() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", [topics[name]]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(root):
        if "pydoc_data" not in path.parts:
            yield f"module {path.relative_to(root).as_posix()}", list(_python_texts(path))
    for name in sorted(sys.builtin_module_names) + sorted(_compiled_modules(root)):
        yield f"compiled {name}", list(_compiled_texts(name))
    for path in sorted((root / "idlelib").glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name not in ("CREDITS.txt",):
            yield f"idle {path.name}", [text]
    help_page = root / "idlelib" / "help.html"
    if help_page.exists():
        page = re.sub(r"</(p|h\d|li|dd|dt)>", "\n\n", help_page.read_text(encoding="utf-8"))
        yield "idle help", [html.unescape(re.sub(r"<[^>]+>", "", page))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"the text of {package} is missing: install jax_gptq[all] first")
        root = Path(spec.submodule_search_locations[0])
        for path in _modules(root):
            name = path.relative_to(root.parent).as_posix()
            yield f"package {name}", list(_python_texts(path))


def _modules(root: Path) -> list[Path]:
    """Its source files, in a fixed order."""
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED.intersection(path.relative_to(root).parts)
    ]


def _python_texts(path: Path) -> Iterator[str]:
    """Docstrings and block comments of one source file, in the order of their lines."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # lib2to3 carries deliberately broken files
        return
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    for match in re.finditer(r"(?:^[ \t]*#.*\n)+", source, re.M):
        block = re.sub(r"^[#!:]+", "", textwrap.dedent(match.group()), flags=re.M)
        found.append((source.count("\n", 0, match.start()) + 1, block))
    for _, text in sorted(found, key=lambda item: item[0]):
        yield text


def _compiled_modules(root: Path) -> list[str]:
    folder = root / "lib-dynload"
    names = {module.name for module in pkgutil.iter_modules([str(folder)])}
    return [name for name in names if "test" not in name]


def _compiled_texts(name: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # modules that a later Python removes
            module = importlib.import_module(name)
    except ImportError:  # an optional extension of this build
        return
    todo: list[object] = [module]
    for _, member in sorted(vars(module).items()):
        todo.append(member)
        if isinstance(member, type):
            todo.extend(value for _, value in sorted(vars(member).items()))
    for member in todo:
        if isinstance(member, type | types.ModuleType) or callable(member):
            text = getattr(member, "__doc__", None)
            if isinstance(text, str):
                yield text


if __name__ == "__main__":
    train, held = split()
    print(f"{len(train)} documents, {sum(map(len, train))} characters to train on")
    print(f"{len(held)} documents, {sum(map(len, held))} characters held back")
