"""Whether a configured run goes on from a ledger: what is named, what may change and what is kept of it."""

import json
import re
from pathlib import Path

import pytest

from tests.checkpoint.test_ledger import PAGES, WORDS, changed, expected, in_second_phase
from yxanul_nemo.checkpoint.going_on import differences, gone_on, require_allowed
from yxanul_nemo.checkpoint.ledger import ChangeRecord, Expected, Ledger, PhasePlan
from yxanul_nemo.errors import UserError

WHERE = Path("runs/a/checkpoints/tokens_000000000000384")


def run(*phases: PhasePlan, sources: dict[str, str] | None = None, corpus: str = "c", **settings: object) -> Expected:
    """A configured run with the settings that its ledger keeps; an underscore in a name stands for a dot."""
    phases = phases or (WORDS, PAGES)
    known: dict[str, object] = {
        "run.seed": 1,
        "model.hidden_size": 64,
        "model.rope_base": 10000.0,
        "data.sources": list(sources or {"prose": "p", "code": "k"}),
        "data.seed": 1,
        "optim": "muon",
        "optim.lr": 0.005,
        "optim.muon.momentum": 0.95,
    }
    known |= {name.replace("__", "."): value for name, value in settings.items()}
    for number, phase in enumerate(phases):
        plan = phase.model_dump()
        plan["tokens"] = plan.pop("planned_tokens")
        known |= {f"curriculum.phases.{number}.{name}": value for name, value in plan.items()}
    return expected(
        phases=phases, settings=known, sources=sources or {"prose": "p", "code": "k"}, corpus_fingerprint=corpus * 64
    )


def in_phase_2(of: Expected | None = None) -> Ledger:
    """Phase 1 finished, one step of phase 2 taken."""
    ledger = Ledger.fresh(of or run()).start_phase(WORDS, micro_batch_size=4, world_size=2)
    ledger = ledger.consume(256, {"prose": 160, "code": 96})
    return ledger.start_phase(PAGES, micro_batch_size=2, world_size=2).consume(128, {"prose": 128})


def finished() -> Ledger:
    return in_phase_2().consume(384, {"prose": 384})


def message(ledger: Ledger, other: Expected, *allow: str) -> str:
    with pytest.raises(UserError) as caught:
        require_allowed(ledger, other, allow, WHERE)
    return str(caught.value)


def test_the_same_run_goes_on_with_the_same_ledger() -> None:
    for ledger, same in ((in_phase_2(), run()), (in_second_phase(), expected())):
        assert differences(ledger, same) == []
        assert gone_on(ledger, same) is ledger


def test_a_change_of_the_future_is_named_by_key_and_taken_where_it_is_allowed() -> None:
    other = run(optim__lr=0.003)
    said = message(in_phase_2(), other)
    assert "optim.lr: 0.005 there, 0.003 here" in said
    assert "repeat the command with 'allow=[optim.lr]'" in said and "python launcher.py run.dir=runs/a." in said
    for allow in ("optim.lr", "optim"):
        taken = gone_on(in_phase_2(), other, [allow])
        assert taken.changes == (ChangeRecord(key="optim.lr", before=0.005, now=0.003, at_tokens=384),)
        assert taken.settings["optim.lr"] == 0.003
        assert gone_on(taken, other) is taken, "it is that run now"
        assert Ledger.model_validate_json(taken.to_json()) == taken
    back = gone_on(gone_on(in_phase_2(), other, ["optim"]), run(), ["optim.lr"])
    assert [(change.before, change.now) for change in back.changes] == [(0.005, 0.003), (0.003, 0.005)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model__hidden_size": 128}, r"model\.hidden_size: 64 there, 128 here.*shapes of weights"),
        ({"data__seed": 2}, r"data\.seed: 1 there, 2 here.*decided what was trained"),
        ({"run__seed": 2}, r"run\.seed: 1 there, 2 here"),
        ({"optim": "adamw"}, r"optim: muon there, adamw here.*other moments"),
    ],
)
def test_what_cannot_change_is_named_and_nothing_allows_it(settings: dict[str, object], named: str) -> None:
    said = message(in_phase_2(), run(**settings), "optim", "curriculum", "model", "data")
    assert re.search(named, said) and "cannot change any more" in said
    assert "allow=" not in said, "advice that cannot work"
    assert "To go on as it was" in said


def test_fixed_and_open_differences_are_told_apart() -> None:
    said = message(in_phase_2(), run(optim__lr=0.003, data__seed=2))
    assert "data.seed: 1 there, 2 here; optim.lr: 0.005 there, 0.003 here" in said
    assert "cannot change any more: data.seed" in said and "allow=" not in said


def test_another_tokenizer_is_never_taken() -> None:
    other = run().model_copy(update={"tokenizer_fingerprint": "x" * 64})
    assert "tokenizer: tttttttttttttttt there, xxxxxxxxxxxxxxxx here" in message(in_phase_2(), other)


@pytest.mark.parametrize(
    ("field", "key", "value"),
    [
        ("seq_len", "seq_len", 16),
        ("tokens_per_step", "tokens_per_step", 128),
        ("planned_tokens", "tokens", 512),
        ("lr_scale", "lr_scale", 1.0),
        ("grad_clip", "grad_clip", 9.0),
        ("blend", "blend", {"prose": 1.0}),
    ],
)
def test_a_finished_phase_never_changes(field: str, key: str, value: object) -> None:
    said = message(in_phase_2(), run(changed(WORDS, **{field: value}), PAGES), "curriculum")
    assert f"cannot change any more: curriculum.phases.0.{key} (phase 1 is finished)" in said


@pytest.mark.parametrize("change", [{"lr_scale": 0.5}, {"planned_tokens": 384}, {"seq_len": 64}])
def test_a_finished_phase_never_changes_even_before_the_next_begins(change: dict[str, object]) -> None:
    assert "phase 2 is finished" in message(finished(), run(WORDS, changed(PAGES, **change)), "curriculum")


def test_the_last_phase_may_take_more_tokens() -> None:
    longer = run(WORDS, changed(PAGES, planned_tokens=1024))
    assert "curriculum.phases.1.tokens: 512 there, 1024 here" in message(finished(), longer)
    taken = gone_on(finished(), longer, ["curriculum.phases.1.tokens"])
    assert taken.current.planned_tokens == 1024 and not taken.current.finished
    assert taken.changes[-1].at_tokens == 768 and taken.phases[0] == finished().phases[0]


def test_more_tokens_for_all_phases_become_more_for_the_last() -> None:
    said = message(
        finished(), run(changed(WORDS, planned_tokens=512), changed(PAGES, planned_tokens=1024)), "curriculum"
    )
    advice = "python launcher.py run.dir=runs/a curriculum.phases.1.tokens=1280 'allow=[curriculum.phases.1.tokens]'"
    assert advice in said, said


def test_a_phase_under_way_changes_what_is_to_come() -> None:
    blend = {"prose": 0.5, "code": 0.5}
    other = run(WORDS, changed(PAGES, lr_scale=0.1, planned_tokens=1024, blend=blend))
    assert "curriculum.phases.1.lr_scale: 1 there, 0.1 here" in message(in_phase_2(), other)
    taken = gone_on(in_phase_2(), other, ["curriculum.phases.1"])
    assert (taken.current.lr_scale, taken.current.planned_tokens, taken.current.blend) == (0.1, 1024, blend)
    assert len(taken.changes) == 3 and taken.phases[0] == in_phase_2().phases[0]


def test_an_adapted_blend_gives_way_to_what_the_user_says_now() -> None:
    ledger = Ledger.fresh(run()).start_phase(WORDS, 4, 2).consume(256, {"prose": 256})
    adapted = ledger.start_phase(PAGES, 2, 2, adapted_blend={"prose": 0.7, "code": 0.3})
    assert differences(adapted, run()) == [], "what was configured is compared"
    taken = gone_on(adapted, run(WORDS, changed(PAGES, blend={"prose": 1.0, "code": 0.0})), ["curriculum"])
    assert taken.current.blend == {"prose": 1.0, "code": 0.0} and taken.current.adapted_blend is None


@pytest.mark.parametrize("change", [{"seq_len": 64}, {"tokens_per_step": 256}, {"planned_tokens": 128}])
def test_what_a_phase_under_way_cannot_change(change: dict[str, int]) -> None:
    ledger = in_phase_2().consume(128, {"code": 128})
    assert "cannot change any more" in message(ledger, run(WORDS, changed(PAGES, **change)), "curriculum")


def test_phases_to_come_change_where_they_are_allowed() -> None:
    added = run(WORDS, PAGES, PAGES)
    assert "curriculum.phases.2: unset there, {" in message(in_phase_2(), added)
    taken = gone_on(in_phase_2(), added, ["curriculum.phases.2"])
    assert taken.changes[0].before is None and taken.changes[0].now["tokens"] == 512
    assert "phase 2 was begun" in message(in_phase_2(), run(WORDS), "curriculum")
    back = gone_on(taken, run(), ["curriculum"])
    assert back.changes[-1].now is None and not [key for key in back.settings if key.startswith("curriculum.phases.2")]


def test_another_source_comes_after_those_that_were_read() -> None:
    more = run(sources={"prose": "p", "code": "k", "law": "l"}, corpus="d")
    assert "data.sources: [prose, code] there, [prose, code, law] here" in message(in_phase_2(), more)
    taken = gone_on(in_phase_2(), more, ["data.sources"])
    assert taken.sources == {"prose": "p", "code": "k", "law": "l"} and taken.corpus_fingerprint == "d" * 64
    for sources in ({"code": "k"}, {"code": "k", "prose": "p"}, {"law": "l"}):
        assert "leave it there, with a share of 0" in message(in_phase_2(), run(sources=sources), "data.sources")


def test_other_tokens_of_a_source_are_named() -> None:
    said = message(in_phase_2(), run(sources={"prose": "x", "code": "k"}, corpus="d"))
    assert "data.sources: tokens cccccccccccccccc there, tokens dddddddddddddddd (other tokens in prose) here" in said
    assert gone_on(in_phase_2(), run(sources={"prose": "x", "code": "k"}, corpus="d"), ["data"]).sources["prose"] == "x"


def test_before_the_tokens_are_there_settings_alone_are_compared() -> None:
    unknown = run(optim__lr=0.003).model_copy(update={"tokenizer_fingerprint": "", "corpus_fingerprint": ""})
    assert [one.key for one in differences(in_phase_2(), unknown, corpus_known=False)] == ["optim.lr"]


def test_a_key_that_an_older_run_has_not_kept_had_the_schemas_default() -> None:
    assert differences(in_phase_2(), run(guards__spike_sigma=None, optim__muon__nesterov=True)) == []
    assert "optim.muon.nesterov: true there, false here" in message(in_phase_2(), run(optim__muon__nesterov=False))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimm.lr", r"allow: names no key: 'optimm\.lr'.*Did you mean 'optim\.lr'"),
        ("logging.every_steps", "decides nothing of training"),
        ("data.seed", "cannot change in a run that has begun"),
    ],
)
def test_what_allow_cannot_name(name: str, said: str) -> None:
    assert re.search(said, message(in_phase_2(), run(), name))


def test_before_the_first_step_windows_may_come_in_another_order() -> None:
    imported = Ledger.fresh(run())
    assert differences(imported, run(data__seed=2)) == []
    assert gone_on(imported, run(data__seed=2)).settings["data.seed"] == 2


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_fingerprint": "f" * 64}, "model"),
        ({"config_fingerprint": "f" * 64}, "config"),
        ({"corpus_fingerprint": "f" * 64}, "data.sources"),
        ({"document_mask": True}, "data.document_mask"),
    ],
)
def test_a_ledger_from_before_settings_were_kept_goes_on_by_its_fingerprints(
    change: dict[str, object], key: str
) -> None:
    other = expected(**change)
    assert f"'allow=[{key}]'" in message(in_second_phase(), other)
    taken = gone_on(in_second_phase(), other, [key])
    assert all(getattr(taken, name) == value for name, value in change.items())
    assert [one.key for one in taken.changes] == [key] and gone_on(taken, other) is taken


def test_an_old_ledger_in_another_order_or_of_another_optimizer_cannot_go_on(tmp_path: Path) -> None:
    ledger = in_second_phase()
    other = expected(window_order="chunks of 8192 tokens, shuffled over 0")
    assert "its windows were read in another order" in message(ledger, other, "config")
    assert "optim: adamw there, muon here" in message(ledger, expected(optimizer="muon"), "config")
    old = {name: value for name, value in json.loads(ledger.to_json()).items() if name != "window_order"}
    (tmp_path / "ledger.json").write_text(json.dumps(old))
    assert "documents one after another" in message(Ledger.read(tmp_path / "ledger.json"), expected())
