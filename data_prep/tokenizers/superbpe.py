"""The released SuperBPE tokenizers, built from their vocab.json, merges.txt and added_tokens.json.

SuperBPE (Liu et al., "SuperBPE: Space Travel for Language Models", 2025) learns its first `t` tokens inside words, as any byte-level BPE
does, and the rest across words. Its pre-tokenizer therefore must not split at spaces: it keeps digit groups apart and nothing
else. The released folders do not say so; loaded as they are they get GPT-2's word regex, which makes every superword unreachable
(about 45 % more tokens) without any error.
"""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from data_prep.tokenizers.superbpe_rules import UTF8_BYTES, assemble, byte_alphabet, superword_rules
from data_prep.tokenizers.tokenizer_checks import check_tokenizer_json
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import read_bounded
from yxanul_nemo.json_files import MAX_TOKENIZER_BYTES, read_json, read_json_object


def build_superbpe(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder with vocab.json, merges.txt and added_tokens.json, or with their content in a tokenizer.json.

    tokenizer_config.json, where present, says how the added tokens are matched. The rules are always `superword_rules`.

    Raises:
        UserError: a file is absent, unreadable, or contradicts the others; the message names it.
    """
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
        where = folder / "tokenizer.json"
        vocab, lines, added = _read_tokenizer_json(where)
        _check_vocab(where, vocab)
    else:
        where = folder / "merges.txt"
        vocab = _read_vocab(folder / "vocab.json")
        _check_vocab(folder / "vocab.json", vocab)
        lines, added = _read_merges(where), _read_added(folder, first_id=len(vocab))
    merges = _check_merges(where, lines, vocab)
    tokenizer = assemble(vocab, merges, superword_rules(), added)
    for place, token in enumerate(added, start=len(vocab)):
        if tokenizer.token_to_id(token.content) != place:
            raise UserError(
                folder,
                f"the added token '{token.content}' has the id {place} and the vocabulary gives it "
                f"{tokenizer.token_to_id(token.content)}",
                "added tokens that are not in the vocabulary",
            )
    return tokenizer


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[int, list[str]]], list[AddedToken]]:
    content = read_json(path, max_bytes=MAX_TOKENIZER_BYTES)
    if isinstance(content, dict):
        # Its rules are left out: `superword_rules` come in their place.
        check_tokenizer_json({key: content.get(key) for key in ("model", "added_tokens")}, path)
    try:
        model = content["model"]
        vocab = dict(model["vocab"])
        entries = sorted(content["added_tokens"], key=lambda entry: entry["id"])
        lines = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(path, f"is not the tokenizer.json of a BPE model ({error!r})", "a SuperBPE tokenizer") from None
    # Some writers list added tokens in the vocabulary, too.
    for entry in entries:
        vocab.pop(entry["content"], None)
    if [entry["id"] for entry in entries] != list(range(len(vocab), len(vocab) + len(entries))):
        raise UserError(path, "ids of the added tokens do not follow those of the vocabulary", "each id once")
    return vocab, list(enumerate(lines, start=1)), [_added(entry["content"], entry) for entry in entries]


def _read_vocab(path: Path) -> dict[str, int]:
    return read_json(
        path,
        "a folder with vocab.json, merges.txt and added_tokens.json",
        "Set tokenizer.path to a SuperBPE folder; for any other tokenizer.json use tokenizer.kind=huggingface.",
        MAX_TOKENIZER_BYTES,
    )


def _check_vocab(path: Path, vocab: dict[str, int]) -> None:
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise UserError(path, "not a JSON object of token -> id", "a byte-level BPE vocabulary")
    if sorted(vocab.values()) != list(range(len(vocab))):
        missing = sorted(set(range(len(vocab))) - set(vocab.values()))
        raise UserError(
            path,
            f"ids are not 0..{len(vocab) - 1}, the first one missing is {missing[0]}",
            "each id once",
            "Copy or download the file again.",
        )
    absent = [byte for character, byte in byte_alphabet().items() if byte in UTF8_BYTES and character not in vocab]
    if absent:
        raise UserError(
            path,
            f"{len(absent)} bytes of UTF-8 have no token, the first is 0x{min(absent):02X}",
            "a byte-level vocabulary, which can write any text",
        )


def _read_merges(path: Path) -> list[tuple[int, list[str]]]:
    """The numbered lines of merges.txt, each cut at its space."""
    try:
        raw = read_bounded(path, MAX_TOKENIZER_BYTES, "one merge in a line, beside vocab.json")
        lines = raw.decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(path, f"not valid UTF-8 ({error})", "", "Copy or download the file again.") from None
    is_header = lines[0].startswith("#version")
    return [
        (number, line.split(" "))
        for number, line in enumerate(lines, start=1)
        if line and not (is_header and number == 1)
    ]


def _check_merges(path: Path, lines: list[tuple[int, list[str]]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    made = set()
    for number, parts in lines:
        if len(parts) != 2 or any(token not in vocab for token in (*parts, "".join(parts))):
            problem = f"{' '.join(parts)!r} is not a merge of two tokens of the vocabulary into a third"
            raise UserError(f"{path}, merge in line {number}", problem, "'LEFT RIGHT'")
        merges.append((parts[0], parts[1]))
        made.add("".join(parts))
    unmade = [token for token in vocab if token not in made and len(token) > 1]
    if unmade:
        raise UserError(
            path,
            f"{len(unmade)} tokens of the vocabulary are made by none of its {len(merges)} merges, the first is {unmade[0]!r}",
            "a merge for each token of more than one byte",
            "The file is cut off or belongs to another vocabulary: copy or download it again.",
        )
    return merges


def _read_added(folder: Path, first_id: int) -> list[AddedToken]:
    """The added tokens by id. Where tokenizer_config.json says nothing about one, it is special and matched as it stands."""
    path = folder / "added_tokens.json"
    numbers = read_json(path, "the ids of the special tokens, beside vocab.json")
    if (
        not isinstance(numbers, dict)
        or not all(type(number) is int for number in numbers.values())
        or sorted(numbers.values()) != list(range(first_id, first_id + len(numbers)))
    ):
        raise UserError(
            path, "ids do not follow those of vocab.json", f"token -> id, with ids from {first_id} on, each once"
        )
    described = {}
    if (folder / "tokenizer_config.json").exists():
        entries = read_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        try:
            described = {str(entry["content"]): dict(entry) for entry in entries.values()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                folder / "tokenizer_config.json",
                f"describes added tokens in another way ({error!r})",
                "id -> content and flags",
            ) from None
    return [_added(content, described.get(content, {})) for content in sorted(numbers, key=numbers.__getitem__)]


def _added(content: str, entry: dict[str, bool]) -> AddedToken:
    flags = {name: entry.get(name, False) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(content, special=entry.get("special", True) is not False, **flags)
