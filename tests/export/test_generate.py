"""Generation: the same text from every source, sampling, streaming, and the user's mistakes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.corpus.manifest import load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from tests.export.conftest import MakeRun
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.restore import restore_model
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.command_line import for_hydra
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.decoding import Decoder
from yxanul_nemo.export.export import export_checkpoint
from yxanul_nemo.export.generate import TextStream, generate, generate_batch, generate_with
from yxanul_nemo.export.hf_folder import open_hf_folder
from yxanul_nemo.export.llama import build_llama
from yxanul_nemo.export.sampling import Sampling
from yxanul_nemo.export.source import Loaded, load_source
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.model.build import reference_precision

PROMPT = "The list"


@pytest.fixture(scope="module")
def sources(exported: tuple[RunConfig, Checkpoint], make_run: MakeRun) -> dict[str, Path]:
    config, checkpoint = exported
    factorized, _ = make_run("export.formats=[hf]", "export.factorized=true")
    export_checkpoint(factorized)
    return {
        "run": config.run.dir,
        "checkpoint": checkpoint.path,
        "nemo": config.run.dir / "export" / "model.nemo",
        "hf": config.run.dir / "export" / "hf",
        "factorized": factorized.run.dir / "export" / "hf",
    }


@pytest.fixture(scope="module")
def loaded(sources: dict[str, Path]) -> Loaded:
    return load_source(sources["hf"], device="cpu")


@torch.no_grad()
def most_likely_text(config: RunConfig, checkpoint: Checkpoint, tokens: int) -> str:
    """Megatron-core's model without a cache, after the end of the document before and the prompt."""
    manifest, tokenizer = load_manifest(config.data_dir), Tokenizer.load(config.run.dir / "tokenizer")
    model = restore_model(config, checkpoint, manifest.vocab_size, *reference_precision())
    ids = [manifest.eos_id, *tokenizer.encode(PROMPT).tolist()]
    begin = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == manifest.eos_id:
            return tokenizer.decode(ids[begin:-1])
    return tokenizer.decode(ids[begin:])


def test_every_source_gives_the_checkpoints_most_likely_text(
    exported: tuple[RunConfig, Checkpoint], sources: dict[str, Path]
) -> None:
    expected = most_likely_text(*exported, 64)
    assert len(set(expected)) > 20, "a text in which something happens"
    for name, source in sources.items():
        pieces: list[str] = []
        written = generate(source, PROMPT, 64, temperature=0, device="cpu", write=pieces.append)
        assert written.text == expected, name
        assert "".join(pieces) == expected
        assert len(pieces) > 1, "it comes in pieces"


def test_the_seed_decides_what_is_sampled(loaded: Loaded) -> None:
    def sample(seed: int, temperature: float = 1.5, top_p: float = 1.0) -> str:
        return generate_with(loaded, PROMPT, 40, temperature, top_p, seed).text

    state = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are not touched"
    greedy = generate_with(loaded, PROMPT, 40, 0, 1.0, 0).text
    assert sample(1, top_p=1e-6) == greedy, "with a tiny top_p only the most likely token is left"
    assert sample(1, temperature=1e-4) == greedy


PROMPTS = ("", PROMPT, "A function returns the first element of a list, and", "def f(x):\n")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_a_batch_with_a_cache_has_the_logits_of_each_text_alone_without_one(
    sources: dict[str, Path], device: str
) -> None:
    loaded = load_source(sources["hf"], device=device)
    model, eos_id = loaded.model.float(), loaded.tokenizer.eos_id
    texts = [[eos_id, *loaded.tokenizer.encode(prompt).tolist()] for prompt in PROMPTS]
    assert len({len(text) for text in texts}) == len(texts), "padding is needed"
    decoder = Decoder(model, texts, eos_id, max(map(len, texts)) + 20)
    logits_BV = decoder.read_prompts()
    for step in range(20):
        for text, logits_V in zip(texts, logits_BV, strict=True):
            alone_V = model(torch.tensor([text], device=device)).logits[0, -1]
            assert (logits_V - alone_V).abs().max() < 1e-4, step
        chosen = [(7 * step + len(text)) % model.config.vocab_size for text in texts]
        texts = [[*text, token] for text, token in zip(texts, chosen, strict=True)]
        logits_BV = decoder.step(torch.tensor(chosen, device=device))
    assert decoder.uses_graph == (device == "cuda")


def test_texts_side_by_side_are_those_of_each_alone(loaded: Loaded) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=1.2, top_k=40, seed=5)
    together = generate_batch(loaded, PROMPTS, sampling)
    alone = [
        generate_batch(loaded, [prompt], Sampling(max_new_tokens=30, temperature=1.2, top_k=40, seed=5 + i))[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone and len(set(together)) == len(PROMPTS)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_text_with_a_repetition_penalty_is_that_of_transformers(loaded: Loaded, penalty: float) -> None:
    ids_BT = torch.tensor([[loaded.tokenizer.eos_id, *loaded.tokenizer.encode(PROMPT).tolist()]])
    expected = loaded.model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        max_new_tokens=40,
        repetition_penalty=penalty,
        eos_token_id=loaded.tokenizer.eos_id,
    )[0, ids_BT.size(1) :].tolist()
    written = generate_batch(loaded, [PROMPT], Sampling(max_new_tokens=40, temperature=0, repetition_penalty=penalty))[
        0
    ]
    assert written.text == loaded.tokenizer.decode([token for token in expected if token != loaded.tokenizer.eos_id])


def test_one_token_to_choose_from_is_the_most_likely_one(loaded: Loaded) -> None:
    greedy = generate_batch(loaded, [PROMPT], Sampling(max_new_tokens=30, temperature=0))
    assert generate_batch(loaded, [PROMPT], Sampling(max_new_tokens=30, temperature=2.0, top_p=1, top_k=1)) == greedy


def test_a_stop_text_ends_the_text_and_is_never_shown(loaded: Loaded) -> None:
    whole = generate_batch(loaded, [PROMPT], Sampling(max_new_tokens=60, temperature=0))[0].text
    stop = whole[len(whole) // 2 :][:4]
    pieces: list[str] = []
    sampling = Sampling(max_new_tokens=60, temperature=0, stop=("absent", stop))
    written = generate_batch(loaded, [PROMPT], sampling, pieces.append)[0]
    assert written.text == whole[: whole.index(stop)] == "".join(pieces)
    assert written.tokens < 60
    # A beginning of a stop that nothing completes belongs to the text.
    sampling = Sampling(max_new_tokens=60, temperature=0, stop=(whole[-3:] + "never",))
    assert generate_batch(loaded, [PROMPT], sampling)[0].text == whole


def test_prompts_of_a_file_become_json_lines(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:3]))
    arguments = ["stage=generate", f"from={sources['hf']}", "generate.max_new_tokens=8", "parallel.device=cpu"]
    arguments += [f"generate.prompts={tmp_path}/prompts.txt", "generate.batch=2", "generate.temperature=0"]
    run_stages(parse(compose(for_hydra(arguments))))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == list(PROMPTS[:3])
    loaded = load_source(sources["hf"], device="cpu")
    for line in lines:
        assert line["text"] == generate_with(loaded, line["prompt"], 8, 0, 1.0, 0).text
    for wrong in ("absent.txt", "empty.txt"):
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(UserError, match=r"generate\.prompts"):
            run_stages(parse(compose(for_hydra([*arguments, f"generate.prompts={tmp_path}/{wrong}"]))))
    with pytest.raises(UserError, match=r"prompt: is given with generate\.prompts"):
        run_stages(parse(compose(for_hydra([*arguments, "prompt=x"]))))


def test_sampling_follows_the_models_probabilities(loaded: Loaded) -> None:
    """First tokens over many seeds against softmax(logits / temperature), cut at top_p: nothing else (a top_k) interferes."""
    tokenizer, temperature, top_p, draws = loaded.tokenizer, 4.0, 0.8, 400
    ids = [tokenizer.eos_id, *tokenizer.encode(PROMPT).tolist()]
    with torch.no_grad():
        probabilities = (loaded.model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    kept = int((ordered.cumsum(0) - ordered < top_p).sum())
    allowed = {tokenizer.decode([token]) for token in tokens[:kept].tolist() if token != tokenizer.eos_id} | {""}
    assert 60 < kept < 600, "more than transformers' usual top_k of 50"
    seen = [generate_with(loaded, PROMPT, 1, temperature, top_p, seed).text for seed in range(draws)]
    assert set(seen) <= allowed
    assert len(set(seen)) > 50
    top_share = (ordered[0] / ordered[:kept].sum()).item()
    share = seen.count(tokenizer.decode(tokens[:1].tolist())) / draws
    assert abs(share - top_share) < 5 * (top_share * (1 - top_share) / draws) ** 0.5


def test_the_end_of_the_document_ends_the_text(sources: dict[str, Path]) -> None:
    """A model that does nothing but to prefer the end: it stops at once, and the end is no part of the text."""
    folder = open_hf_folder(sources["hf"])
    weights, tokenizer = folder.weights(), folder.tokenizer()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    table = weights["model.embed_tokens.weight"]
    table[:] = 0.01
    table[tokenizer.eos_id] = 5.0
    weights["model.norm.weight"].fill_(1.0)
    ending = Loaded(build_llama(weights, folder.config), tokenizer, 128, "x")
    assert generate_with(ending, PROMPT, 20, 0, 1.0, 0) == ("", 0)


def test_text_comes_in_whole_characters(loaded: Loaded) -> None:
    text = "a\u4f60\u597d \U0001f389 end \U0001f469\u200d\U0001f4bb"
    ids = loaded.tokenizer.encode(text).tolist()
    assert len(ids) > len(text), "characters are split over tokens"
    pieces: list[str] = []
    stream = TextStream(loaded.tokenizer, pieces.append)
    for token in ids:
        stream.take(token)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    # A character that never becomes whole is shown at the end.
    stream.take(ids[1])
    assert stream.text == text
    stream.end()
    assert stream.text == text + "\ufffd"
    assert stream.tokens == len(ids) + 1


def test_the_context_is_never_exceeded(loaded: Loaded) -> None:
    long = "word " * 60
    used = 1 + len(loaded.tokenizer.encode(long))
    assert used < 128
    assert generate_with(loaded, long, 1000, 0, 1.0, 0).tokens <= 128 - used
    with pytest.raises(
        UserError, match=r"prompt: has [\d,]+ tokens; expected fewer than the 128 of the model's context"
    ):
        generate_with(loaded, "word " * 200, 10, 0, 1.0, 0)


def test_a_run_gives_its_best_checkpoint_or_its_latest(make_run: MakeRun) -> None:
    from tests.export.conftest import commit_random_weights

    config, first = make_run()
    store = CheckpointStore(config.run.dir / "checkpoints")
    assert load_source(config.run.dir).described == str(first.path), "the newest where none is marked"
    store.mark_best(first, "bits", 1.0)
    first.path.rename(first.path.with_name("aside"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_source(config.run.dir)
    first.path.with_name("aside").rename(first.path)
    (first.path / "ledger.json").write_text("{}")
    with pytest.raises(UserError, match=r"ledger\.json: has 2 bytes instead of"):
        load_source(first.path)
    assert commit_random_weights(config, seed=2).path == first.path, "the damaged one is replaced"
    assert load_source(config.run.dir, "latest").described == str(first.path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: is -1.0; expected 0"),
        ({"temperature": float("nan")}, "temperature: is nan"),
        ({"top_p": 0.0}, "top_p: is 0.0; expected above 0"),
        ({"top_p": 1.1}, "top_p: is 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens: is 0; expected at least 1"),
        ({"top_k": -1}, "top_k: is -1; expected 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: is 0.0; expected above 0"),
        ({"stop": [""]}, "stop: has an empty text"),
        ({"checkpoint": "first"}, "checkpoint: is 'first'; expected best or latest"),
        ({"device": "tpu"}, "device: is 'tpu'; expected auto, cpu or cuda"),
    ],
)
def test_wrong_settings_are_named(sources: dict[str, Path], settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(sources["hf"], PROMPT, **settings)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_damaged_folders_are_refused_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(sources["hf"], tmp_path / "hf")
    path, config_path = folder / "model.safetensors", folder / "config.json"
    whole, config = load_file(path), json.loads(config_path.read_text())

    def refuses(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_source(folder)

    save_file({name: weight for name, weight in whole.items() if "layers.1.mlp.up" not in name}, path)
    refuses(r"model\.safetensors: lacks 'model\.layers\.1\.mlp\.up_proj\.weight'")
    save_file(whole | {"lm_head.weight": torch.zeros(2, 2)}, path)
    refuses(r"model\.safetensors: has the unknown 'lm_head\.weight'")
    save_file(whole | {"model.norm.weight": torch.zeros(7)}, path)
    refuses(r"has 'model\.norm\.weight' as \[7\] instead of \[32\]")
    save_file(whole, path)
    path.write_bytes(path.read_bytes()[:-10])
    refuses(r"model\.safetensors: is no safetensors file")
    path.unlink()
    refuses(r"model\.safetensors: does not exist")
    save_file(whole, path)
    for change, message in (
        ({"model_type": "gpt2"}, r"config\.json: model_type is 'gpt2' \(Input should be 'llama' or 'yxanul'\)"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": 300}, r"has 'model\.embed_tokens\.weight' as \[700, 32\] instead of \[300, 32\]"),
    ):
        config_path.write_text(json.dumps(config | change))
        refuses(message)
    config_path.write_text("{")
    refuses(r"config\.json: not valid JSON")


def test_code_in_a_folder_is_not_run(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(sources["factorized"], tmp_path / "hf")
    (folder / "modeling_yxanul.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert generate(folder, PROMPT, 3, device="cpu").tokens
    assert not (tmp_path / "executed").exists()


def test_the_stage_streams_what_the_command_line_asks_for(
    exported: tuple[RunConfig, Checkpoint], sources: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*overrides: str) -> str:
        run_stages(parse(compose(["stage=generate", *overrides])))
        return capsys.readouterr().out

    settings = ("generate.max_new_tokens=20", "generate.temperature=0")
    for prompt in (PROMPT, "a, {b}: it's $x = [${run.name}] \\"):
        expected = generate(sources["nemo"], prompt, 20, temperature=0, device="cpu")
        given = for_hydra([f"prompt={prompt}"])
        assert run(f"from={sources['nemo']}", *given, *settings) == f"{prompt}{expected.text}\n"
        assert run(f"run.dir={exported[0].run.dir}", *given, *settings) == f"{prompt}{expected.text}\n", "its own run"
    with pytest.raises(
        UserError, match=r"absent does not exist; expected the folder of a run or of a checkpoint, a \.nemo"
    ):
        run(f"from={sources['nemo'].with_name('absent')}")
    with pytest.raises(UserError, match="from: names 2 models; expected one of them"):
        run(f"from=[{sources['hf']},{sources['nemo']}]")
    with pytest.raises(UserError, match="prompt: has "):
        run(f"from={sources['hf']}", f"prompt={'word ' * 300}")


def test_weights_split_over_files_are_read_by_their_index(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(sources["hf"], tmp_path / "hf")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_file in parts.items():
        save_file({name: whole[name] for name in of_file}, folder / file)
    weight_map = {name: file for file, of_file in parts.items() for name in of_file}
    index = folder / "model.safetensors.index.json"

    def reads(changed: object) -> dict[str, torch.Tensor]:
        index.write_text(json.dumps({"metadata": {}, "weight_map": changed}))
        return open_hf_folder(folder).weights()

    found = reads(weight_map)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert generate(folder, PROMPT, 5, temperature=0).text == generate(sources["hf"], PROMPT, 5, temperature=0).text
    for changed, message in (
        (weight_map | {names[0]: "../model-00001-of-00002.safetensors"}, "a .safetensors file of this folder"),
        (weight_map | {names[0]: "/etc/passwd"}, "a .safetensors file of this folder"),
        (weight_map | {names[0]: "model-00002-of-00002.safetensors"}, f"holds '{names[0]}', which"),
        (weight_map | {"model.more": "model-00002-of-00002.safetensors"}, "lacks 'model.more'"),
        (weight_map | {"model.more": "model-00003.safetensors"}, "model-00003.safetensors: does not exist"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        with pytest.raises(UserError, match=message):
            reads(changed)
