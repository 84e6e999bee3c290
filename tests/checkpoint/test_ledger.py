"""The ledger's sums, its JSON, and the comparison with a configured run."""

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


def test_same_run_matches():
    ledger = in_second_phase()
    assert ledger.differences(expected()) == []
    assert ledger.require_matches(expected()) is ledger


def test_phases_not_begun_may_change():
    ledger = Ledger.fresh(expected()).start_phase(WORDS, 1, 1).consume(64, {"prose": 64})
    other = expected(phases=(WORDS, changed(PAGES, lr_scale=0.1), PAGES))
    assert ledger.require_matches(other) is ledger


@pytest.mark.parametrize("name", ["corpus", "tokenizer", "model", "config"])
def test_another_fingerprint_needs_its_escape(name):
    ledger, other = in_second_phase(), expected(**{f"{name}_fingerprint": "f" * 64})
    with pytest.raises(UserError, match=f"checkpoint.allow_mismatch=\\[{name}\\]"):
        ledger.require_matches(other)
    taken = ledger.require_matches(other, allow=[name])
    assert getattr(taken, f"{name}_fingerprint") == "f" * 64
    assert len(taken.notes) == 1 and name in taken.notes[0] and "384 tokens" in taken.notes[0]
    assert taken.require_matches(other) is taken


def test_another_document_mask_is_named_and_needs_its_escape():
    ledger, other = in_second_phase(), expected(document_mask=True)
    sentence = "document_mask: the checkpoint was trained with data.document_mask=false, the run says true"
    assert ledger.differences(other) == [sentence]
    with pytest.raises(UserError, match=rf"{sentence}.*checkpoint.allow_mismatch=\[document_mask\]"):
        ledger.require_matches(other)
    taken = ledger.require_matches(other, allow=["document_mask"])
    assert taken.document_mask and taken.notes == (f"allowed at 384 tokens: {sentence}",)
    assert taken.require_matches(other) is taken


def test_a_run_in_another_order_cannot_go_on(tmp_path):
    """A run that was begun before windows were shuffled is named by what its ledger lacks."""
    ledger, sentence = in_second_phase(), r"window_order: the checkpoint's run reads its windows as {}"
    with pytest.raises(UserError, match=sentence.format("chunks of 6144.*cannot change .window_order.")):
        ledger.require_matches(expected(window_order="chunks of 8192 tokens, shuffled over 0"), allow=["config"])
    old = {name: value for name, value in json.loads(ledger.to_json()).items() if name != "window_order"}
    (tmp_path / "ledger.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=sentence.format("documents one after another")):
        Ledger.read(tmp_path / "ledger.json").require_matches(expected())
    untrained = Ledger.fresh(expected(window_order="chunks of 8192 tokens, shuffled over 0"))
    assert untrained.require_matches(expected()) == Ledger.fresh(expected())


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


@pytest.mark.parametrize("allow", [(), ("config",)])
def test_another_optimizer_is_refused_by_name(allow):
    ledger, other = in_second_phase(), expected(optimizer="muon")
    with pytest.raises(
        UserError, match=r"optimizer: the checkpoint was trained with optim=adamw.*cannot change \(optimizer\)"
    ):
        ledger.require_matches(other, allow=allow)
    assert Ledger.fresh(other).optimizer == "muon"


def test_a_ledger_from_before_there_was_a_choice_is_of_adamw(tmp_path):
    ledger = in_second_phase()
    old = {name: value for name, value in json.loads(ledger.to_json()).items() if name != "optimizer"}
    (tmp_path / "ledger.json").write_text(json.dumps(old))
    assert Ledger.read(tmp_path / "ledger.json") == ledger and ledger.optimizer == "adamw"


def test_names_every_difference():
    other = expected(corpus_fingerprint="f" * 64, phases=(changed(WORDS, lr_scale=0.9), changed(PAGES, grad_clip=2.0)))
    with pytest.raises(UserError) as caught:
        in_second_phase().require_matches(other, allow=["corpus"])
    message = str(caught.value)
    assert "phase_1.lr_scale: phase 1 is finished with 0.5, the curriculum now says 0.9" in message
    assert "phase_2.grad_clip" in message and "checkpoint.allow_mismatch=[phase_2.grad_clip]" in message
    assert "cannot change (phase_1.lr_scale)" in message
    assert "corpus:" not in message
    assert [sentence.partition(":")[0] for sentence in in_second_phase().differences(other)] == [
        "corpus",
        "phase_1.lr_scale",
        "phase_2.grad_clip",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_len", 16),
        ("tokens_per_step", 128),
        ("planned_tokens", 512),
        ("lr_scale", 1.0),
        ("grad_clip", 9.0),
        ("blend", {"prose": 1.0}),
    ],
)
def test_a_finished_phase_never_changes(field, value):
    other = expected(phases=(changed(WORDS, **{field: value}), PAGES))
    with pytest.raises(UserError, match="cannot change"):
        in_second_phase().require_matches(
            other, allow=[f"phase_1.{field}"] if field not in ("seq_len", "tokens_per_step") else []
        )


def test_a_finished_phase_never_changes_even_before_the_next_begins():
    ledger = Ledger.fresh(expected()).start_phase(WORDS, 1, 1).consume(256, {"prose": 256})
    other = expected(phases=(changed(WORDS, lr_scale=1.0), PAGES))
    with pytest.raises(UserError, match=r"cannot change \(phase_1\.lr_scale\)"):
        ledger.require_matches(other, allow=["phase_1.lr_scale"])


def test_a_phase_under_way_changes_with_its_escape():
    blend = {"prose": 0.5, "code": 0.5}
    other = expected(phases=(WORDS, changed(PAGES, lr_scale=0.1, planned_tokens=1024, blend=blend)))
    allow = ["phase_2.lr_scale", "phase_2.planned_tokens", "phase_2.blend"]
    with pytest.raises(UserError, match=r"phase_2\.lr_scale: phase 2 is trained for 128 tokens with 1\.0"):
        in_second_phase().require_matches(other)
    taken = in_second_phase().require_matches(other, allow=allow)
    assert (taken.current.lr_scale, taken.current.planned_tokens, taken.current.blend) == (0.1, 1024, blend)
    assert len(taken.notes) == 3
    assert taken.phases[0] == in_second_phase().phases[0]


@pytest.mark.parametrize("change", [{"seq_len": 64}, {"tokens_per_step": 256}, {"planned_tokens": 128}])
def test_what_a_phase_under_way_cannot_change(change):
    ledger = in_second_phase().consume(128, {"code": 128})
    other = expected(phases=(WORDS, changed(PAGES, **change)))
    allow = ["phase_2.planned_tokens"] if "planned_tokens" in change else []
    with pytest.raises(UserError, match="cannot change"):
        ledger.require_matches(other, allow=allow)


def test_a_shortened_curriculum_is_refused():
    with pytest.raises(UserError, match="phase 2 was begun, but the curriculum now has only 1 phases"):
        in_second_phase().require_matches(expected(phases=(WORDS,)))


def test_an_unknown_escape_is_named():
    with pytest.raises(UserError, match="Did you mean 'tokenizer'"):
        in_second_phase().require_matches(expected(), allow=["tokeniser"])


def test_escapes_of_earlier_phases_may_stay_in_the_recipe():
    ledger = in_second_phase()
    assert ledger.require_matches(expected(), allow=["phase_1.lr_scale", "corpus"]) is ledger


def test_another_layout_is_noted():
    ledger = in_second_phase()
    assert ledger.with_layout(2, 2) is ledger
    moved = ledger.with_layout(1, 4)
    assert (moved.current.micro_batch_size, moved.current.world_size) == (1, 4)
    assert "world_size 2 -> 4" in moved.notes[-1]
    assert moved.tokens_total == ledger.tokens_total


def test_an_adapted_blend_stands_beside_the_configured_one():
    ledger = Ledger.fresh(expected()).start_phase(WORDS, micro_batch_size=4, world_size=2)
    ledger = ledger.consume(256, {"prose": 256})
    adapted = {"prose": 0.7, "code": 0.3}
    begun = ledger.start_phase(PAGES, micro_batch_size=2, world_size=2, adapted_blend=adapted)
    assert begun.current.adapted_blend == adapted and begun.current.blend == PAGES.blend
    assert begun.notes == ("phase 2 at 256 tokens: blend adapted to prose 0.7, code 0.3",)
    assert Ledger.model_validate_json(begun.to_json()) == begun
    assert begun.differences(expected()) == [], "what was configured is compared"
    # Another configured blend, where it is allowed, takes its place.
    other = expected(phases=(WORDS, changed(PAGES, blend={"prose": 1.0, "code": 0.0})))
    with pytest.raises(UserError, match=r"phase_2\.blend"):
        begun.require_matches(other)
    taken = begun.require_matches(other, allow=["phase_2.blend"])
    assert taken.current.blend == {"prose": 1.0, "code": 0.0} and taken.current.adapted_blend is None


def test_ledgers_from_before_blends_were_adapted_are_read():
    text = json.loads(in_second_phase().to_json())
    for record in text["phases"]:
        del record["adapted_blend"]
    assert Ledger.model_validate_json(json.dumps(text)) == in_second_phase()
