"""Reading configurations that somebody else made, such as a `.nemo` file's, as data and nothing more.

Hydra builds whatever a `_target_` names, and NeMo builds what `target` names (CVE-2025-23304: code execution on loading
a model); OmegaConf's `${...}` reads the environment and other keys; YAML's tags make Python objects (CVE-2020-14343).
A configuration with any of these is refused, whoever would read it later.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml

from yxanul_nemo.errors import UserError
from yxanul_nemo.files import read_bounded

MAX_CONFIG_BYTES = 256 << 10
MAX_NODES = 20_000
MAX_DEPTH = 32

INSTANTIATING_KEYS = frozenset(
    {"_target_", "_args_", "_partial_", "_recursive_", "_convert_", "class_path", "init_args"}
)
"""Keys by which Hydra and Lightning's command line build objects."""
TARGET_KEY = "target"
"""Key by which NeMo chooses the class of a model or of a part of it."""


def read_config(path: Path, allowed_targets: Collection[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping of plain values, which another reader may look through after this one, and `check_config` it.

    Raises:
        UserError: `read_plain` or `check_config` refuses it.
    """
    config = read_plain(path)
    check_config(config, allowed_targets, path)
    return config


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; `${...}` in it is text, which nothing looks up.

    Raises:
        UserError: it is too large, no YAML mapping, or uses tags, anchors or duplicate keys.
    """
    raw = read_bounded(path, MAX_CONFIG_BYTES, "a YAML file")
    try:
        _require_plain(yaml.parse(raw, Loader=yaml.SafeLoader), path)
        config = yaml.load(raw, Loader=_UniqueKeyLoader)  # noqa: S506 (it is a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        first_line = str(error).partition("\n")[0]
        _refuse(path, f"cannot be read as YAML ({first_line})")
    if not isinstance(config, dict):
        _refuse(path, "is not a plain mapping")
    return config


def check_config(config: Any, allowed_targets: Collection[str] = (), where: object = "model_config.yaml") -> None:
    """Refuse a configuration that could make a reader build objects or look anything up.

    Args:
        config: nested dicts and lists of str, int, float, bool and None.
        allowed_targets: full names of classes that `target` may hold, as `package.module.Class`.
        where: how to name the configuration in the message.

    Raises:
        UserError: names the key and what is wrong with it, at any depth: a `_target_` or its kin (in any case, also
            inside a dotted key), a `target` that is not allowed, an interpolation `${...}`, a key or value of another
            type, a container inside itself, or more than `MAX_NODES` nodes or `MAX_DEPTH` levels.
    """
    if not isinstance(config, dict):
        _refuse(where, "is not a plain mapping")
    stack: list[tuple[str, Any, int]] = [("", config, 0)]
    nodes = 0
    while stack:
        key, node, depth = stack.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            _refuse(where, f"has more than {MAX_NODES} nodes or {MAX_DEPTH} levels")
        # Not any mapping: those of OmegaConf resolve their interpolations while they are looked through.
        if isinstance(node, dict):
            for name, value in node.items():
                _check_key(where, key, name, value, allowed_targets)
                stack.append((f"{key}.{name}" if key else name, value, depth + 1))
        elif isinstance(node, list):
            stack.extend((f"{key}[{index}]", value, depth + 1) for index, value in enumerate(node))
        elif isinstance(node, str):
            if "${" in node:
                _refuse(where, f"has an interpolation in {key} ({node[:80]!r})")
        elif node is not None and not isinstance(node, bool | int | float):
            _refuse(where, f"has a {type(node).__name__} in {key}")


def _check_key(where: object, parent: str, name: Any, value: Any, allowed_targets: Collection[str]) -> None:
    place = f" in {parent}" if parent else ""
    if not isinstance(name, str):
        _refuse(where, f"has a key that is a {type(name).__name__}{place}")
    if "${" in name:
        _refuse(where, f"has an interpolation in a key ({name[:80]!r}){place}")
    # A dotted key becomes a nested one when somebody merges it, so each part of it is looked at.
    for part in name.replace("[", ".").replace("]", ".").split("."):
        plain = part.strip().casefold()
        if plain in INSTANTIATING_KEYS:
            _refuse(where, f"has the key {name[:80]!r}{place}, which builds objects")
        if plain == TARGET_KEY and (not isinstance(value, str) or value not in allowed_targets):
            shown = repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"
            _refuse(where, f"has {name[:80]}={shown}{place}, a class that is not allowed")


def _require_plain(events: Any, path: Path) -> None:
    """Refuse aliases (their expansion may be exponential) and explicit tags before anything is built."""
    depth = 0
    for nodes, event in enumerate(events):
        if getattr(event, "anchor", None) is not None:
            _refuse(path, "uses YAML anchors")
        if getattr(event, "tag", None) is not None:
            _refuse(path, f"uses the YAML tag {event.tag[:80]!r}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or nodes > 3 * MAX_NODES:
            _refuse(path, f"has more than {MAX_NODES} nodes or {MAX_DEPTH} levels")


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win; a reader that takes the first would see another configuration."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key in seen or key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {str(key_node.value)[:80]!r} is there twice or is no plain text",
                    key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse(where: object, problem: str) -> NoReturn:
    raise UserError(where, problem, "a configuration of plain values", "Do not use this file; get it from its maker.")
