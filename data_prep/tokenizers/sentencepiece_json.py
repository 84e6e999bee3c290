"""A sentencepiece model as a tokenizer of the `tokenizers` library, so that `transformers` loads it with its own rules.

Left alone with a .model file, transformers guesses a converter and loses the model's whitespace rules without a word.
The fields are those of sentencepiece_model.proto.
"""

import math

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from data_prep.tokenizers.charsmap import charsmap_growth
from yxanul_nemo.errors import UserError

MOST_PIECE_CHARS = 1024
SPACE = "\u2581"
"""Sentencepiece's character for a space."""


def check_sentencepiece(serialized: bytes, source: object) -> None:
    """Refuse a model that would make sentencepiece read what is not there, or work for ever.

    Raises:
        UserError: names `source` and what is wrong.
    """
    try:
        model = proto.ModelProto.FromString(serialized)
        for spec in (model.normalizer_spec, model.denormalizer_spec):
            if spec.precompiled_charsmap:
                charsmap_growth(spec.precompiled_charsmap)
        _require_pieces(model)
    except (DecodeError, ValueError) as error:
        raise UserError(source, f"not a sentencepiece model that can be read ({error})", "a .model file") from None


def _require_pieces(model: proto.ModelProto) -> None:
    unknown = [
        number for number, piece in enumerate(model.pieces) if piece.type == proto.ModelProto.SentencePiece.UNKNOWN
    ]
    if len(unknown) != 1:
        raise ValueError(f"{len(unknown)} pieces stand for what is unknown, and one is needed")
    for number, piece in enumerate(model.pieces):
        if not 0 < len(piece.piece) <= MOST_PIECE_CHARS or not math.isfinite(piece.score):
            raise ValueError(f"piece {number} has {len(piece.piece)} characters and the score {piece.score}")


def convert_sentencepiece(serialized: bytes, source: object) -> Tokenizer:
    """The same model in the `tokenizers` library; UserError (naming `source`) for model types it does not have."""
    model = proto.ModelProto.FromString(serialized)
    tokenizer = Tokenizer(_model(model, source))
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    piece_type = proto.ModelProto.SentencePiece
    for piece in model.pieces:
        if piece.type in (piece_type.CONTROL, piece_type.USER_DEFINED):
            special = piece.type == piece_type.CONTROL
            tokenizer.add_tokens([AddedToken(piece.piece, special=special, normalized=False)])
    return tokenizer


def _model(model: proto.ModelProto, source: object) -> models.Model:
    kinds = proto.TrainerSpec
    scores = {piece.piece: piece.score for piece in model.pieces}
    # Not trainer_spec.unk_id: sentencepiece itself goes by the type.
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
    fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == kinds.UNIGRAM:
        return models.Unigram(
            [(piece.piece, piece.score) for piece in model.pieces], unk_id=unknown, byte_fallback=fallback
        )
    if model.trainer_spec.model_type == kinds.BPE:
        vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
        return models.BPE(
            vocab=vocab,
            merges=_merges(model, scores, vocab),
            unk_token=model.pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=fallback,
        )
    name = kinds.ModelType.Name(model.trainer_spec.model_type)
    raise UserError(source, f"is a sentencepiece model of type {name}", "UNIGRAM or BPE")


def _merges(model: proto.ModelProto, scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Sentencepiece merges any two neighbours that make a piece, best score first: each way to cut a piece is a merge."""
    mergeable = proto.ModelProto.SentencePiece.NORMAL
    pieces = {piece.piece for piece in model.pieces if piece.type == mergeable}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return sorted(merges, key=lambda pair: (-scores[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))


def _normalizer(model: proto.ModelProto) -> normalizers.Normalizer:
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE if spec.escape_whitespaces else " "))
    return normalizers.Sequence(steps)


def _decoder(model: proto.ModelProto) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
