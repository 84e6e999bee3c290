"""The ledger's sums and its JSON."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from yxanul_nemo.checkpoint.ledger import Expected, Ledger, PhasePlan, ReadingRecord
from yxanul_nemo.errors import UserError

WORDS = PhasePlan(seq_len=8, tokens_per_step=64, planned_tokens=256, lr_scale=0.5, grad_clip=1.0)
PAGES = PhasePlan(
    seq_len=32,
    tokens_per_step=128,
    planned_tokens=512,
    lr_scale=1.0,
    grad_clip=0.5,
    blend={"prose": 0.75, "code": 0.25},
)


def expected(**changes) -> Expected:
    fields = {
        "corpus_fingerprint": "c" * 64,
        "tokenizer_fingerprint": "t" * 64,
        "model_fingerprint": "m" * 64,
        "config_fingerprint": "o" * 64,
        "window_order": "chunks of 6144 tokens, shuffled over 4194304",
        "phases": (WORDS, PAGES),
    }
    return Expected(**(fields | changes))


def changed(plan: PhasePlan, **changes) -> PhasePlan:
    return PhasePlan(**(dict(plan) | changes))


def in_second_phase() -> Ledger:
    """Phase 1 finished, one step of phase 2 taken."""
    ledger = Ledger.fresh(expected()).start_phase(WORDS, micro_batch_size=4, world_size=2)
    for _ in range(4):
        ledger = ledger.consume(64, {"prose": 40, "code": 24})
    return ledger.start_phase(PAGES, micro_batch_size=2, world_size=2).consume(128, {"prose": 128}, skipped_steps=1)


def test_counts_by_phase_source_and_step():
    ledger = in_second_phase()
    assert (ledger.tokens_total, ledger.phase, ledger.phase_tokens, ledger.steps_total) == (384, 2, 128, 5)
    assert ledger.tokens_per_source == {"prose": 288, "code": 96}
    assert [record.finished for record in ledger.phases] == [True, False]
    assert ledger.phases[0].tokens_per_source == {"prose": 160, "code": 96}
    assert ledger.skipped_steps == 1


def test_returns_new_ledgers():
    before = in_second_phase()
    text = before.to_json()
    before.consume(128, {"code": 128})
    before.with_note("note")
    assert before.to_json() == text
    with pytest.raises(ValidationError):
        before.tokens_total = 0


def test_file_round_trip(tmp_path):
    ledger = in_second_phase().with_note("ein Vermerk: größer")
    ledger.write(tmp_path / "ledger.json")
    assert Ledger.read(tmp_path / "ledger.json") == ledger


@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_sums_hold_for_any_sequence_of_steps(steps):
    plan = changed(WORDS, planned_tokens=64 * 12)
    ledger = Ledger.fresh(expected(phases=(plan,))).start_phase(plan, 1, 1)
    prose = 0
    for from_prose, skipped in steps:
        ledger = ledger.consume(64, {"prose": from_prose, "code": 64 - from_prose}, skipped_steps=int(skipped))
        prose += from_prose
    assert ledger.tokens_total == 64 * len(steps) == sum(ledger.tokens_per_source.values())
    assert ledger.tokens_per_source["prose"] == prose
    assert ledger.skipped_steps == sum(skipped for _, skipped in steps)
    assert Ledger.model_validate_json(ledger.to_json()) == ledger


@pytest.mark.parametrize(
    ("tokens", "sources", "reason"),
    [
        (128, {"prose": 127}, "sources add up"),
        (100, {"prose": 100}, "whole steps"),
        (512, {"prose": 512}, "of only 512"),
        (-128, {"prose": -128}, "negative"),
        (128, {"prose": 256, "code": -128}, "negative"),
    ],
)
def test_refuses_to_consume_what_does_not_add_up(tokens, sources, reason):
    with pytest.raises(ValueError, match=reason):
        in_second_phase().consume(tokens, sources)


def test_refuses_phases_out_of_order():
    with pytest.raises(ValueError, match="before a phase"):
        Ledger.fresh(expected()).consume(64, {"prose": 64})
    with pytest.raises(ValueError, match="phase 2 was begun before phase 1 was finished"):
        Ledger.fresh(expected()).start_phase(WORDS, 1, 1).start_phase(PAGES, 1, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens_total": 383}, "tokens_total"),
        ({"tokens_total": 384.0}, "tokens_total"),
        ({"tokens_total": "384"}, "tokens_total"),
        ({"tokens_total": -1}, "tokens_total"),
        ({"phase": 1}, "phase is 1"),
        ({"phase_tokens": 0}, "phase_tokens"),
        ({"steps_total": 6}, "steps_total"),
        ({"skipped_steps": 6}, "skipped_steps"),
        ({"tokens_per_source": {"prose": 384}}, "tokens_per_source"),
        ({"tokens_per_source": {"prose": 288, "code": 95, "x": 1}}, "tokens_per_source"),
        ({"format_version": 2}, "format_version"),
        ({"format": "other"}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"model_fingerprint": None}, "model_fingerprint"),
        ({"phases": []}, "phase is 2"),
    ],
)
def test_refuses_a_file_that_does_not_add_up(tmp_path, change, reason):
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(json.loads(in_second_phase().to_json()) | change))
    with pytest.raises(UserError, match=reason):
        Ledger.read(path)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("consumed_tokens", 192, "sources add up"),
        ("index", 3, "numbered"),
        ("seq_len", 48, "not a multiple"),
        ("planned_tokens", 500, "not a multiple"),
        ("lr_scale", float("nan"), "lr_scale"),
        ("blend", {"prose": float("inf")}, "blend"),
        ("world_size", 0, "world_size"),
    ],
)
def test_refuses_a_phase_that_does_not_add_up(tmp_path, field, value, reason):
    fields = json.loads(in_second_phase().to_json())
    fields["phases"][1][field] = value
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=reason):
        Ledger.read(path)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"tokens_total": ' + b"9" * 9999]
)
def test_refuses_garbage(tmp_path, raw):
    path = tmp_path / "ledger.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"ledger\.json"):
        Ledger.read(path)


def test_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Ledger.read(tmp_path / "ledger.json")


def test_a_change_of_what_is_read_is_kept_beside_what_was_planned_before():
    ledger = in_second_phase()
    first = ReadingRecord(first_window=0, end_window=16, shares={"prose": 0.75, "code": 0.25})
    planned = ledger.with_reading(first)
    assert planned.notes == ledger.notes and planned.current.readings == (first,)
    assert planned.with_reading(first.model_copy(update={"first_window": 4})) == planned
    other = ReadingRecord(first_window=4, end_window=16, shares={"prose": 0.5, "code": 0.5})
    changed = planned.with_reading(other)
    assert changed.current.readings == (first, other)
    assert changed.notes == ("phase 2 at 384 tokens: reads up to window 16, prose 0.5, code 0.5",)
    assert Ledger.model_validate_json(changed.to_json()) == changed


def test_a_ledger_from_before_document_masks_is_of_whole_windows(tmp_path):
    ledger = in_second_phase()
    old = {name: value for name, value in json.loads(ledger.to_json()).items() if name != "document_mask"}
    (tmp_path / "ledger.json").write_text(json.dumps(old))
    assert Ledger.read(tmp_path / "ledger.json") == ledger and not ledger.document_mask
    assert Ledger.fresh(expected(document_mask=True)).document_mask


def test_a_ledger_from_before_there_was_a_choice_is_of_adamw(tmp_path):
    ledger = in_second_phase()
    old = {name: value for name, value in json.loads(ledger.to_json()).items() if name != "optimizer"}
    (tmp_path / "ledger.json").write_text(json.dumps(old))
    assert Ledger.read(tmp_path / "ledger.json") == ledger and ledger.optimizer == "adamw"


def test_another_layout_is_noted():
    ledger = in_second_phase()
    assert ledger.with_layout(2, 2) is ledger
    moved = ledger.with_layout(1, 4)
    assert (moved.current.micro_batch_size, moved.current.world_size) == (1, 4)
    assert "world_size 2 -> 4" in moved.notes[-1]
    assert moved.tokens_total == ledger.tokens_total


def test_ledgers_from_before_blends_were_adapted_are_read():
    text = json.loads(in_second_phase().to_json())
    for record in text["phases"]:
        del record["adapted_blend"]
    assert Ledger.model_validate_json(json.dumps(text)) == in_second_phase()


def test_an_adapted_blend_stands_beside_the_configured_one():
    ledger = Ledger.fresh(expected()).start_phase(WORDS, micro_batch_size=4, world_size=2)
    ledger = ledger.consume(256, {"prose": 256})
    adapted = {"prose": 0.7, "code": 0.3}
    begun = ledger.start_phase(PAGES, micro_batch_size=2, world_size=2, adapted_blend=adapted)
    assert begun.current.adapted_blend == adapted and begun.current.blend == PAGES.blend
    assert begun.notes == ("phase 2 at 256 tokens: blend adapted to prose 0.7, code 0.3",)
    assert Ledger.model_validate_json(begun.to_json()) == begun


def test_a_ledger_from_before_settings_were_kept_is_read():
    text = json.loads(in_second_phase().to_json())
    for name in ("settings", "sources", "changes", "lineage"):
        del text[name]
    assert Ledger.model_validate_json(json.dumps(text)) == in_second_phase()
