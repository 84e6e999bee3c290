"""Whether a configured run goes on from a ledger: what differs, what of it may change, and what the ledger keeps of a change.

Keys are sorted by `config.changes`; what was trained already cannot change, whatever they are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.ledger import IDENTITY, ChangeRecord, Expected, Ledger, PhasePlan, PhaseRecord, replaced
from yxanul_nemo.config.changes import (
    OPTIMIZER_KEY,
    SOURCES_KEY,
    change_of,
    default_of,
    may_be_allowed,
    shown,
)
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import keys_of
from yxanul_nemo.errors import UserError, nearest

PHASE_KEYS = {name: name for name in PhasePlan.model_fields} | {"planned_tokens": "tokens"}
"""Field of a phase's plan -> its key."""
BEFORE_SETTINGS = {
    "model_fingerprint": "model",
    "config_fingerprint": "config",
    "document_mask": "data.document_mask",
    "window_order": "data.chunk_tokens",
    "optimizer": OPTIMIZER_KEY,
}
"""What is compared with a ledger from before settings were kept in it -> how it is named."""
WINDOW_KEYS = ("data.seed", "data.chunk_tokens", "data.shuffle_tokens")
"""They decide the order of windows."""
MOST_NAMED = 12
"""Differences that one message names."""


@dataclass(frozen=True)
class Difference:
    """One thing that the configured run does not share with the ledger."""

    key: str
    before: Any
    now: Any
    firm: str = ""
    """Why it cannot change; empty where `allow` may name it."""

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.before)} there, {shown(self.now)} here"


def differences(ledger: Ledger, expected: Expected, corpus_known: bool = True) -> list[Difference]:
    """Return what the configured run does not share with the ledger.

    Args:
        corpus_known: whether `expected` knows the prepared tokens; before they are there, settings alone are compared.
    """
    found: list[Difference] = []
    if ledger.settings:
        found += setting_differences(ledger.settings, expected.settings, ledger.phase, is_trained=bool(ledger.phases))
    elif corpus_known:
        found += _before_settings(ledger, expected)
    if corpus_known:
        found += _of_content(ledger, expected, named={one.key for one in found})
    found += [one for record in ledger.phases for one in _of_phase(ledger, record, expected)]
    return found


def setting_differences(
    there: Mapping[str, Any], here: Mapping[str, Any], begun_phases: int = 0, is_trained: bool = True
) -> list[Difference]:
    """Return what differs between two runs' settings (`identity.settings_of`).

    Args:
        begun_phases: phases that are left out, because their records say what was trained.
        is_trained: whether there was a step; before it, the order of windows may change.
    """
    found: list[Difference] = []
    other_optimizer = there.get(OPTIMIZER_KEY) != here.get(OPTIMIZER_KEY)
    phases: dict[str, None] = {}
    for key in dict.fromkeys([*there, *here]):
        phase = re.match(r"curriculum\.phases\.(\d+)", key)
        if phase:
            if int(phase[1]) >= begun_phases:
                phases[phase[0]] = None
            continue
        if other_optimizer and key.startswith(f"{OPTIMIZER_KEY}."):
            continue
        before, now = (_value(settings, key) for settings in (there, here))
        if before != now and (is_trained or key not in WINDOW_KEYS):
            found.append(Difference(key, before, now, _why_firm(key, before, now)))
    for prefix in phases:
        found += _of_phase_to_come(prefix, there, here)
    return found


def require_allowed(
    ledger: Ledger,
    expected: Expected,
    allow: Sequence[str] = (),
    where: Path = Path("checkpoint"),
    corpus_known: bool = True,
) -> list[Difference]:
    """Return what differs, all of which is allowed.

    Args:
        expected: the run as now configured.
        allow: keys that may change, or sections of them (`RunConfig.allow`).
        where: the checkpoint's folder, for the message.
        corpus_known: as for `differences`.

    Raises:
        UserError: names every difference that is not allowed, and every one that cannot be.
    """
    for name in allow:
        _require_allowable(name)
    found = differences(ledger, expected, corpus_known)
    refused = [one for one in found if one.firm or not _is_allowed(one.key, allow)]
    if refused:
        raise _refusal(refused, found, where)
    return found


def gone_on(ledger: Ledger, expected: Expected, allow: Sequence[str] = (), where: Path = Path("checkpoint")) -> Ledger:
    """Return the ledger to go on with: allowed differences are taken over, each with the token from which it holds.

    Raises as `require_allowed`, with the same arguments.
    """
    return _taking(ledger, expected, require_allowed(ledger, expected, allow, where))


def _is_allowed(key: str, allow: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def _require_allowable(name: str) -> None:
    if may_be_allowed(name) or name in BEFORE_SETTINGS.values():
        return
    if change_of(name) == "free":
        raise UserError("allow", f"names '{name}', which decides nothing of training", fix="Leave it out of allow.")
    if change_of(name) is not None:
        raise UserError(
            "allow", f"names '{name}', which cannot change in a run that has begun", fix="Use a new run.dir."
        )
    valid = [key for key in keys_of(RunConfig) if may_be_allowed(key)]
    raise UserError("allow", f"names no key: '{name}'", "keys as in [optim.lr]", nearest(name, valid))


def _before_settings(ledger: Ledger, expected: Expected) -> Iterator[Difference]:
    """Differences from a ledger that has fingerprints of settings alone."""
    for field, key in BEFORE_SETTINGS.items():
        before, now = getattr(ledger, field), getattr(expected, field)
        if before == now or (field == "window_order" and not ledger.phases):
            continue
        if field.endswith("_fingerprint"):
            before, now = before[:16], now[:16]
        firm = "its windows were read in another order" if field == "window_order" else ""
        firm = "it keeps other moments" if field == "optimizer" else firm
        yield Difference(key, before, now, firm)


def _value(settings: Mapping[str, Any], key: str) -> Any:
    if key in settings:
        return settings[key]
    try:
        # Of a version in which the key was not there yet, or is no longer.
        return default_of(key)
    except KeyError:
        return None


def _why_firm(key: str, before: Any, now: Any) -> str:
    if key == OPTIMIZER_KEY:
        return "the other optimizer keeps other moments"
    if key == SOURCES_KEY:
        kept = [name for name in now or [] if name in (before or [])]
        return (
            ""
            if kept == before
            else "what was read of a source is told by its place; leave it there, with a share of 0"
        )
    if change_of(key) != "fixed":
        return ""
    return "it decides the shapes of weights" if key.startswith("model.") else "it decided what was trained"


def _of_phase_to_come(prefix: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    before, now = (
        {key.removeprefix(f"{prefix}."): value for key, value in settings.items() if key.startswith(f"{prefix}.")}
        for settings in (there, here)
    )
    if not before or not now:
        yield Difference(prefix, before or None, now or None)
        return
    for name in before:
        if before[name] != now[name]:
            yield Difference(f"{prefix}.{name}", before[name], now[name])


def _of_content(ledger: Ledger, expected: Expected, named: set[str]) -> Iterator[Difference]:
    if ledger.tokenizer_fingerprint != expected.tokenizer_fingerprint:
        prints = ledger.tokenizer_fingerprint[:16], expected.tokenizer_fingerprint[:16]
        yield Difference("tokenizer", *prints, firm="weights know the vocabulary that they were trained with")
    if ledger.corpus_fingerprint == expected.corpus_fingerprint or SOURCES_KEY in named:
        return
    others = [name for name, value in ledger.sources.items() if expected.sources.get(name) not in (None, value)]
    which = f" (other tokens in {', '.join(others)})" if others else ""
    yield Difference(
        SOURCES_KEY, f"tokens {ledger.corpus_fingerprint[:16]}", f"tokens {expected.corpus_fingerprint[:16]}{which}"
    )


def _of_phase(ledger: Ledger, record: PhaseRecord, expected: Expected) -> Iterator[Difference]:
    """Differences from a phase that was begun."""
    prefix = f"curriculum.phases.{record.index - 1}"
    if record.index > len(expected.phases):
        yield Difference(prefix, f"{record.consumed_tokens:,} tokens trained", None, f"phase {record.index} was begun")
        return
    plan = expected.phases[record.index - 1]
    for name, key in PHASE_KEYS.items():
        before, now = getattr(record, name), getattr(plan, name)
        if before == now:
            continue
        grows = name == "planned_tokens" and now > before and record is ledger.current
        firm = ""
        if record.finished and not grows:
            firm = f"phase {record.index} is finished"
        elif name in ("seq_len", "tokens_per_step"):
            firm = f"phase {record.index} is under way"
        elif name == "planned_tokens" and now < record.consumed_tokens:
            firm = f"phase {record.index} was trained for {record.consumed_tokens:,} tokens"
        yield Difference(f"{prefix}.{key}", before, now, firm)


def _refusal(refused: Sequence[Difference], found: Sequence[Difference], where: Path) -> UserError:
    run_dir = where.parent.parent
    listed = "; ".join(map(str, refused[:MOST_NAMED]))
    if len(refused) > MOST_NAMED:
        listed += f"; and {len(refused) - MOST_NAMED} more"
    fixes = []
    firm = [one for one in refused if one.firm]
    if firm:
        keys_of_reason: dict[str, list[str]] = {}
        for one in firm[:MOST_NAMED]:
            keys_of_reason.setdefault(one.firm, []).append(one.key)
        reasons = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in keys_of_reason.items())
        fixes.append(f"This cannot change any more: {reasons}.")
    else:
        names = dict.fromkeys(one.key for one in found)
        fixes.append(f"To change that from here on, repeat the command with 'allow=[{','.join(names)}]'.")
    if more := _more_tokens(found):
        fixes.append(f"To train for more tokens: python launcher.py run.dir={run_dir} {more}.")
    fixes.append(f"To go on as it was: python launcher.py run.dir={run_dir}.")
    return UserError(where, f"it is of another run: {listed}", "the settings it was trained with", " ".join(fixes))


def _more_tokens(found: Sequence[Difference]) -> str:
    """Return the keys that add to the last phase what was asked of phases that are finished; empty where it was something else."""
    changed = [one for one in found if re.fullmatch(r"curriculum\.phases\.\d+\.tokens", one.key)]
    if len(changed) < 2 or len(changed) < len(found) or not any(one.firm for one in changed):
        return ""
    added = sum(one.now - one.before for one in changed)
    number = max(int(one.key.split(".")[2]) for one in changed)
    key = f"curriculum.phases.{number}.tokens"
    last = next(one for one in changed if one.key == key)
    return f"{key}={last.before + added} 'allow=[{key}]'" if added > 0 else ""


def _taking(ledger: Ledger, expected: Expected, found: Sequence[Difference]) -> Ledger:
    now = {name: getattr(expected, name) for name in IDENTITY}
    if all(getattr(ledger, name) == value for name, value in now.items()) and not found:
        return ledger
    kept = [
        ChangeRecord(key=one.key, before=_json(one.before), now=_json(one.now), at_tokens=ledger.tokens_total)
        for one in found
    ]
    phases = ledger.phases
    if ledger.current is not None and ledger.phase <= len(expected.phases):
        plan = expected.phases[ledger.phase - 1]
        changes: dict[str, Any] = {
            name: getattr(plan, name) for name in PHASE_KEYS if getattr(plan, name) != getattr(ledger.current, name)
        }
        if "blend" in changes:
            # What the user says now counts, not what was made of what they said before.
            changes["adapted_blend"] = None
        phases = (*phases[:-1], replaced(ledger.current, **changes))
    return replaced(ledger, **now, phases=phases, changes=(*ledger.changes, *kept))


def _json(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
