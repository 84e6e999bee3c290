"""Readable text out of installed packages and Python itself, by reading their files, never by importing them.

Only a fixed list of packages is read, and of each only files that come out of its wheel, so that the same versions, Python's patch
release among them, give the same text on every machine.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from yxanul_nemo.log import logger

README_PACKAGES = (
    "aiohttp", "aistore", "annotated-types", "attrs", "braceexpand", "charset-normalizer", "click", "cloudpickle",
    "datasets", "dill", "distro", "einops", "filelock", "fsspec", "h11", "httpcore", "httpx", "huggingface-hub", "humanize",
    "hydra-core", "idna", "jinja2", "joblib", "lightning", "lightning-utilities", "markdown", "markdown-it-py",
    "megatron-core", "ml-dtypes", "mpmath", "msgspec", "multidict", "multiprocess", "narwhals", "nemo-toolkit", "networkx",
    "numpy", "omegaconf", "onnx", "overrides", "packaging", "pandas", "pillow", "platformdirs", "propcache", "pyarrow",
    "pydantic", "pygments", "python-dateutil", "pyyaml", "regex", "requests", "rich", "safetensors", "scikit-learn",
    "scipy", "sentencepiece", "smart-open", "sniffio", "sortedcontainers", "sympy", "tenacity", "tensorboard",
    "threadpoolctl", "tokenizers", "torch", "torchmetrics", "tqdm", "transformers", "typer", "typing-extensions", "urllib3",
    "wandb", "webdataset", "werkzeug", "wrapt", "xxhash", "yarl",
)  # fmt: skip
"""Distributions whose description is read."""

SOURCE_FOLDERS = (
    "networkx", "numpy", "scipy", "sklearn", "sympy", "pandas", "torch/nn", "torch/optim", "torch/distributions",
    "torch/utils", "transformers/generation", "transformers/utils", "transformers/pipelines", "lightning/pytorch",
    "lightning/fabric", "hydra", "omegaconf", "fsspec", "rich", "aiohttp", "jinja2", "joblib", "click", "pygments/formatters",
    "requests", "urllib3", "markdown", "werkzeug", "torchmetrics", "mpmath",
)  # fmt: skip
"""Folders of packages whose sources are read."""

STDLIB_MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "cmd", "codecs", "collections", "concurrent", "configparser",
    "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "dis", "doctest", "email", "enum", "fileinput",
    "fractions", "ftplib", "functools", "gettext", "glob", "gzip", "heapq", "html", "http", "imaplib", "importlib", "inspect",
    "ipaddress", "json", "locale", "logging", "mailbox", "multiprocessing", "ntpath", "numbers", "optparse", "os", "pathlib",
    "pdb", "pickle", "pickletools", "platform", "plistlib", "posixpath", "pprint", "profile", "pyclbr", "pydoc", "queue",
    "random", "re", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "sqlite3",
    "statistics", "string", "subprocess", "symtable", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize",
    "trace", "traceback", "turtle", "types", "typing", "unittest", "urllib", "uuid", "warnings", "wave", "weakref", "xml",
    "xmlrpc", "zipfile", "zoneinfo",
)  # fmt: skip
"""Modules of Python's library whose sources are read."""

LEFT_OUT_FOLDERS = frozenset({"tests", "test", "testing", "_vendor", "vendor", "vendored", "externals", "__pycache__"})
MIN_CHARS, MAX_CHARS = 200, 6000
"""Shorter documents are dropped, longer ones cut into pieces at paragraphs."""
MIN_DOCSTRING_BYTES, MIN_DOCSTRING_SHARE, MAX_SOURCE_BYTES = 3000, 0.35, 200_000

FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "for",
        "from",
        "has",
        "have",
        "if",
        "in",
        "is",
        "it",
        "its",
        "may",
        "must",
        "not",
        "of",
        "on",
        "one",
        "only",
        "or",
        "other",
        "should",
        "so",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "used",
        "using",
        "was",
        "we",
        "when",
        "where",
        "which",
        "will",
        "with",
        "you",
    ]
)


LETTER = re.compile(r"[^\W\d_]| ")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
TEMPLATE = re.compile(r"%\(\w+\)|\{\w*\}")
"""Docstrings that are filled in at run time."""
CODE_OR_TABLE = re.compile(r">>>|^\s*(\||\+[-=]|\.\. |\$ )|^(    |\t)", re.MULTILINE)
NOT_PROSE = re.compile(r">>>|^\s*(\.\. |\||\+[-=]|[-=~^*#]{3,}|@|:\w+)|^\s*\S+\s:\s|::$|^    ", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A piece of text and where it is from, for people (`numpy/lib/_npyio_impl.py:savetxt`)."""

    text: str
    origin: str


def readmes() -> Iterator[Document]:
    """Descriptions of packages, without badges, markup of pages and changelogs."""
    for name in README_PACKAGES:
        try:
            description = importlib.metadata.metadata(name)["Description"] or ""
        except importlib.metadata.PackageNotFoundError:
            logger.debug("demo corpus: package %s is not installed", name)
            continue
        text = "\n\n".join(
            part for part in _paragraphs(_clean_readme(description)) if CODE_OR_TABLE.search(part) is None
        )
        yield from pieces(text, f"{name}/README")


def topics() -> Iterator[Document]:
    """Chapters of the Python language reference, as `help("topic")` shows them."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not path.is_file():
        logger.debug("demo corpus: this Python has no %s", path)
        return
    for statement in _parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(statement.value).items()):
                text = re.sub(r"\n\*{3,}\n", "\n", text)
                yield from pieces(text.strip(), f"python/topics/{name}")


def source_files() -> list[list[tuple[Path, str]]]:
    """Groups of source files (path, name for people), each in an order that depends on the names alone and mixes its folders."""
    groups = []
    for folder in SOURCE_FOLDERS:
        spec = importlib.util.find_spec(folder.partition("/")[0])
        if spec is None or not spec.submodule_search_locations:
            logger.debug("demo corpus: package %s is not installed", folder)
            continue
        package = Path(spec.submodule_search_locations[0])
        groups.append(_python_files(package.parent / folder, package.parent))
    library = Path(sysconfig.get_paths()["stdlib"])
    stdlib = []
    for module in STDLIB_MODULES:
        if (library / f"{module}.py").is_file():
            stdlib.append((library / f"{module}.py", f"python/{module}.py"))
        elif (library / module).is_dir():
            stdlib += [(path, f"python/{name}") for path, name in _python_files(library / module, library)]
    groups.append(sorted(stdlib, key=_shuffled))
    return groups


def _python_files(folder: Path, root: Path) -> list[tuple[Path, str]]:
    files = []
    for parent, folders, names in folder.walk():
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS]
        below = parent.relative_to(root).as_posix()
        for name in names:
            if name.endswith(".py") and not name.startswith(("test_", "conftest")):
                files.append((parent / name, f"{below}/{name}"))
    return sorted(files, key=_shuffled)


def _shuffled(file: tuple[Path, str]) -> bytes:
    return hashlib.sha256(file[1].encode()).digest()


def read_source(path: Path, name: str, wanted: set[str]) -> dict[str, list[Document]]:
    """What one file gives to the wanted ones of `prose`, `reference` and `code`.

    Prose is the paragraphs of running text in docstrings, reference whole docstrings of functions, code functions without their
    docstrings. A function's docstring serves either prose or reference, by the name of its file.
    """
    found: dict[str, list[Document]] = {kind: [] for kind in sorted(wanted)}
    source = path.read_bytes()
    # Parsing takes nearly all of the time: only files with much to say are worth it.
    in_quotes = sum(map(len, source.split(b'"""')[1::2]))
    if in_quotes < max(MIN_DOCSTRING_BYTES, MIN_DOCSTRING_SHARE * len(source)) or len(source) > MAX_SOURCE_BYTES:
        return found
    tree = _parse(source)
    lines = source.decode().splitlines()
    for_prose = _shuffled((path, name))[0] % 2 == 0
    for node in _definitions(tree):
        origin = name if isinstance(node, ast.Module) else f"{name}:{node.name}"
        docstring = _docstring(node)
        if len(docstring) >= MIN_CHARS and TEMPLATE.search(docstring) is None:
            if isinstance(node, FUNCTION) and not for_prose:
                if "reference" in wanted and _letters_share(docstring) > 0.55:
                    found["reference"].extend(pieces(docstring, origin))
            elif "prose" in wanted:
                text = "\n\n".join(paragraph for paragraph in _paragraphs(docstring) if is_prose(paragraph))
                found["prose"].extend(pieces(text, origin))
        if isinstance(node, FUNCTION) and "code" in wanted and not node.name.startswith("test_"):
            code = _function_code(node, lines)
            if MIN_CHARS <= len(code) <= MAX_CHARS:
                found["code"].append(Document(code, origin))
    return found


def _definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, its classes and functions and the classes' methods, in the order of the file."""
    yield tree
    for node in tree.body:
        if isinstance(node, FUNCTION):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield node
            yield from (member for member in node.body if isinstance(member, FUNCTION))


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in other people's docstrings
        return ast.parse(source)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def _function_code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Source of a function from its first decorator on; the docstring is left out."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    body = list(range(first, _last_line(node) + 1))
    if ast.get_docstring(node, clean=False) is not None:
        docstring = node.body[0]
        if docstring.lineno == node.lineno:
            return ""
        body = [number for number in body if not docstring.lineno <= number <= _last_line(docstring)]
    code = textwrap.dedent("\n".join(lines[number - 1].rstrip() for number in body)).strip()
    return re.sub(r"\n{3,}", "\n\n", code)


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None, "of a text that was parsed"
    return node.end_lineno


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text: long enough, with the small words of English, without signs of code or tables."""
    if NOT_PROSE.search(paragraph):
        return False
    words = re.findall(r"[A-Za-z']+", paragraph.lower())
    if len(words) < 12:
        return False
    return sum(word in FUNCTION_WORDS for word in words) / len(words) >= 0.25 and _letters_share(paragraph) > 0.7


def _letters_share(text: str) -> float:
    return len(LETTER.findall(text)) / max(1, len(text))


def _clean_readme(text: str) -> str:
    text = text.replace("\r\n", "\n")
    text = re.sub(r"<!--.*?-->|^```.*?^```$|^~~~.*?^~~~$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?ms)^\.\. (image|raw|figure|\|[^|\n]*\| image)::?.*?(?=^\S|\Z)", "", text)
    text = re.sub(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])", "", text)
    text = re.sub(r"\[\s*\](\([^)]*\)|\[[^\]]*\])", "", text)
    text = re.sub(r"\[([^\]\[]+)\]\([^)\s]*\)", r"\1", text)
    text = re.sub(r"<[^>\n]{1,300}>", "", text)
    text = re.sub(r"(?m)^\[[^\]]+\]:\s*\S+.*$", "", text)
    text = re.sub(r"(?m)^\.\. _[^:\n]+:.*$", "", text)
    text = re.sub(r"(?m)^.*https?://(img\.shields|badge|codecov|ci\.|travis)\S*.*$", "", text)
    cut = re.search(
        r"(?im)^(#+\s*)?(changelog|change log|changes|release notes|history|release history|what's new)\s*$", text
    )
    if cut:
        text = text[: cut.start()]
    return re.sub(r"\n[ \t]*(\n[ \t]*)+", "\n\n", text).strip()


def pieces(text: str, origin: str) -> Iterator[Document]:
    """The text in pieces of at most MAX_CHARS, cut between paragraphs; pieces under MIN_CHARS are dropped."""
    part: list[str] = []
    size = number = 0
    for paragraph in [*_paragraphs(text), None]:
        if paragraph is None or size + len(paragraph) > MAX_CHARS:
            joined = "\n\n".join(part)
            if MIN_CHARS <= len(joined) <= MAX_CHARS:
                number += 1
                yield Document(joined, origin if number == 1 else f"{origin}#{number}")
            part, size = [], 0
        if paragraph is not None:
            part.append(paragraph)
            size += len(paragraph) + 2
