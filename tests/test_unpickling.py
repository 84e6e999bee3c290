"""No file is unpickled and no object is built from a configuration anywhere in the product: its source is looked through.

Stands for CVE-2025-32434 and CVE-2026-24747 (torch.load, also with weights_only), CVE-2025-23264, -23265 and CVE-2026-24150, -24151,
-24152 (Megatron-LM), CVE-2026-24157, -24159 and CVE-2025-23304 (NeMo), CVE-2025-23307 (NeMo Curator), CVE-2025-23298
(Transformers4Rec): all of them are code run by loading a checkpoint, a dataset or a model. CVE-2007-4559: tarfile's extraction.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("yxanul_nemo", "data_prep", "benchmarks")
    for path in (REPO_DIR / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
WEIGHTS_READER = REPO_DIR / "yxanul_nemo" / "model" / "nemo_archive.py"
"""NeMo's format holds weights written by torch.save. Here alone they are read, with weights_only=True and no way around it; what
else is in such a file is refused (tests/export/test_nemo_model.py)."""
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    *("torch.load", "np.load", "numpy.load", "eval", "exec", "compile", "__import__", "os.system"),
    *("hydra.utils.instantiate", "instantiate", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load"),
}
FORBIDDEN_METHODS = {"extractall", "extract", "from_config_dict"}
FORBIDDEN_ARGUMENTS = {("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False), ("shell", True)}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {m}" for m in modules if m.partition(".")[0] in UNPICKLING)
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_METHODS:
                yield f"{node.lineno}: calls {called}"
            if called == "yaml.load" and not any("Loader" in dotted(k.value) for k in node.keywords):
                yield f"{node.lineno}: yaml.load without a loader"
            for keyword in node.keywords:
                if (
                    isinstance(keyword.value, ast.Constant)
                    and (keyword.arg, keyword.value.value) in FORBIDDEN_ARGUMENTS
                ):
                    yield f"{node.lineno}: {keyword.arg}={keyword.value.value}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPO_DIR).as_posix())
def test_nothing_in_a_file_unpickles_or_builds(path: Path) -> None:
    found = list(offences(ast.parse(path.read_text(encoding="utf-8"))))
    if path == WEIGHTS_READER:
        (call,) = found
        line = path.read_text(encoding="utf-8").splitlines()[int(call.partition(":")[0]) - 1]
        assert "torch.load(" in line and "weights_only=True" in line
        found = []
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "tar.extractall(folder)",
        "hydra.utils.instantiate(config)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert list(offences(ast.parse(line)))
