"""Hostile configurations. Each case names the attack or CVE that it stands for."""

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from yxanul_nemo.errors import UserError
from yxanul_nemo.unpacking.safe_config import check_config, read_config

ALLOWED = ("yxanul_nemo.model.nemo.YxanulModel",)
HARMLESS = {
    "target": ALLOWED[0],
    "nemo_version": "3.0.0",
    "model": {"hidden_size": 768, "eps": 1e-5, "tied": True, "bias": None, "lengths": [8, 16, [32]]},
    "targets": 3,
    "note": "costs $5 {not an interpolation} _target_",
}


def loop() -> dict:
    outer: dict = {"a": []}
    outer["a"].append(outer)
    return outer


def billion_laughs() -> dict:
    node: list = ["lol"]
    for _ in range(30):
        node = [node] * 10
    return {"a": node}


def deep() -> dict:
    node: dict = {}
    for _ in range(10_000):
        node = {"a": node}
    return node


HOSTILE: dict[str, object] = {
    "CVE-2025-23304 _target_": {"_target_": "os.system", "_args_": ["id"]},
    "CVE-2025-23304 _target_ in a part": {"optim": {"sched": {"_target_": "builtins.eval"}}},
    "CVE-2025-23304 _target_ in a list": {"callbacks": [1, [{"_target_": "subprocess.Popen"}]]},
    "CVE-2025-23304 _target_ in a tuple": {"callbacks": ({"_target_": "subprocess.Popen"},)},
    "_target_ even of an allowed class": {"model": {"_target_": ALLOWED[0]}},
    "_target_ that is no text": {"_target_": None},
    "_target_ in another case": {"a": {"_Target_": "os.system"}},
    "_target_ with blanks": {"a": {" _target_ ": "os.system"}},
    "_target_ in a dotted key": {"optim._target_": "os.system"},
    "_target_ in a bracketed key": {"optim[_target_]": "os.system"},
    "Hydra _args_": {"a": {"_args_": ["id"]}},
    "Hydra _partial_": {"a": {"_partial_": True}},
    "Hydra _recursive_": {"a": {"_recursive_": False}},
    "Hydra _convert_": {"a": {"_convert_": "object"}},
    "Lightning class_path": {"a": {"class_path": "os.system", "init_args": {}}},
    "CVE-2025-23304 NeMo target": {"target": "nemo.core.config.hydra_runner"},
    "NeMo target of a part": {"encoder": {"target": "os.system"}},
    "NeMo target that begins like an allowed one": {"target": ALLOWED[0] + "Evil"},
    "NeMo target that is a mapping": {"target": {"x": 1}},
    "NeMo target in a list": {"target": [ALLOWED[0]]},
    "interpolation of the environment": {"a": "${oc.env:AWS_SECRET_ACCESS_KEY}"},
    "interpolation that makes a mapping": {"a": "${oc.create:'{_target_: os.system}'}"},
    "interpolation inside text": {"a": ["x ${b} y"]},
    "interpolation escaped": {"a": "\\${b}"},
    "interpolation nested": {"a": "${${b}}"},
    "interpolation in a key": {"${b}": 1},
    "interpolation as the target": {"target": "${a}", "a": ALLOWED[0]},
    "python object": {"a": object()},
    "python function": {"a": print},
    "bytes": {"a": b"_target_"},
    "set": {"a": {"_target_"}},
    "key that is a number": {"a": {1: 2}},
    "key that is a tuple": {("_target_",): "os.system"},
    "OmegaConf mapping, which hides its interpolations": OmegaConf.create({"a": "${b}", "b": 1}),
    "loop": loop(),
    "CVE-2003-1564 billion laughs": billion_laughs(),
    "deep nesting": deep(),
    "OmegaConf mapping inside": {"a": OmegaConf.create({"b": "${c}", "c": 1})},
    "not a mapping": ["_target_"],
    "nothing": None,
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_config(attack):
    with pytest.raises(UserError, match=r"model_config\.yaml"):
        check_config(HOSTILE[attack], ALLOWED)


def test_harmless_config_passes():
    check_config(HARMLESS, ALLOWED)
    with pytest.raises(UserError, match="not allowed"):
        check_config(HARMLESS)


def test_names_the_place():
    with pytest.raises(UserError, match=r"'_target_' in model\.layers\[1\]"):
        check_config({"model": {"layers": [{}, {"_target_": "os.system"}]}})


HOSTILE_YAML: dict[str, tuple[str, str]] = {
    "CVE-2025-23304 _target_": ("a:\n  _target_: os.system\n", "builds objects"),
    "CVE-2020-14343 python object": ("a: !!python/object/apply:os.system ['id']\n", "tag"),
    "CVE-2017-18342 python module": ("a: !!python/module:os\n", "tag"),
    "CVE-2020-1747 python object by new": ("a: !!python/object/new:type {}\n", "tag"),
    "own tag": ("a: !evil x\n", "tag"),
    "standard tag with a wrong value": ("a: !!timestamp x\n", "tag"),
    "CVE-2003-1564 billion laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchors"),
    "merge of a hidden key": ("a: {<<: {_target_: os.system}}\n", "builds objects|twice|plain text"),
    "loop": ("&a a: *a\n", "anchors"),
    "duplicate key, readers differ": ("target: x\ntarget: y\n", "twice"),
    "key that is a list": ("? [_target_]\n: os.system\n", "plain text"),
    "two documents": ("a: 1\n---\n_target_: os.system\n", "cannot be read as YAML"),
    "deep nesting": ("a: " + "[" * 5000 + "]" * 5000, "levels"),
    "number of many digits": ("a: " + "9" * 5000, "cannot be read as YAML"),
    "impossible date": ("a: 2024-99-99\n", "cannot be read as YAML"),
    "date": ("a: 2024-01-01\n", "has a date"),
    "interpolation": ("a: ${oc.env:HOME}\n", "interpolation"),
    "large": ("a: 1\n" + "#" * 300_000, "bytes"),
    "not YAML": ("{", "cannot be read as YAML"),
    "control characters": ("a: \x00\n", "cannot be read as YAML"),
    "a list": ("- 1\n", "not a plain mapping"),
    "empty": ("", "not a plain mapping"),
}


@pytest.mark.parametrize("attack", HOSTILE_YAML)
def test_hostile_yaml(tmp_path, attack):
    text, reason = HOSTILE_YAML[attack]
    (tmp_path / "model_config.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_config(tmp_path / "model_config.yaml", ALLOWED)


def test_reads_what_omegaconf_writes(tmp_path):
    path = tmp_path / "model_config.yaml"
    OmegaConf.save(OmegaConf.create(HARMLESS), path)
    assert read_config(path, ALLOWED) == HARMLESS


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path / "model_config.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(string.printable, max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable, max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)


def has_target(node: object) -> bool:
    if isinstance(node, dict):
        return any(key in ("_target_", "target") or has_target(value) for key, value in node.items())
    return isinstance(node, list) and any(map(has_target, node))


@given(
    st.dictionaries(st.sampled_from(["a", "b", "_target_", "target"]), VALUES, max_size=3),
    st.lists(st.booleans(), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_fuzz_nested_targets(config, path):
    """However deep it is put, a target is found; what passes has none and no interpolation."""
    for in_list in path:
        config = {"x": [config]} if in_list else {"x": config}
    try:
        check_config(config)
    except UserError:
        return
    assert not has_target(config) and "${" not in str(config)


@given(st.binary(max_size=300) | st.text(string.printable + "\u2028é", max_size=300).map(str.encode))
@settings(max_examples=400, deadline=None)
def test_fuzz_random_file(tmp_path_factory, raw):
    path: Path = tmp_path_factory.getbasetemp() / "fuzzed_config.yaml"
    path.write_bytes(raw)
    try:
        config = read_config(path)
    except UserError:
        return
    assert isinstance(config, dict) and not has_target(config)


BASE = yaml.safe_dump(HARMLESS).encode()
PIECES = st.sampled_from(
    [
        b"&a ",
        b"*a",
        b"!!int ",
        b"!!python/name:os.system ",
        b"<<: ",
        b"? ",
        b"{",
        b"[",
        b"- ",
        b"---\n",
        b"0b_",
        b"=",
        b"|\n",
    ]
)


@given(st.lists(st.tuples(st.integers(0, len(BASE)), PIECES | st.binary(max_size=6)), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_fuzz_changed_file(tmp_path_factory, changes):
    raw = BASE
    for place, piece in changes:
        raw = raw[:place] + piece + raw[place:]
    path: Path = tmp_path_factory.getbasetemp() / "changed_config.yaml"
    path.write_bytes(raw)
    try:
        config = read_config(path, ALLOWED)
    except UserError:
        return
    assert config.get("target", ALLOWED[0]) == ALLOWED[0]
