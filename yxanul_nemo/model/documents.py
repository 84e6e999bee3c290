"""Documents in packed windows: where each begins, from the token ids alone, in the forms that attention can be kept inside them by.

A document begins with the EOS in front of it, as every text does in validation, evaluation and generation: its first token is
predicted from that EOS, and the label of its last token is the next EOS, so no prediction looks over a boundary. A window begins
one too (the rest of a document from the window before). Positions are counted through: RoPE's scores depend on distances alone.
"""

from collections import deque
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

SMALLEST_ROOM = 32
"""Transformer Engine rounds shorter lists up to this (fused_attn, 2.20), and longer ones up to 512 to a power of two."""
TYPICAL_DOCUMENT_TOKENS = 512
"""What is assumed of a document's length before any is seen; web text has some hundred tokens."""
REMEMBERED_STEPS = 256
"""Steps that a room is kept for after the batch that needed it."""
SHRINK_FACTOR = 4
"""A room so many times too large is given up: attention's time grows with it, but a new graph takes seconds."""


@dataclass(frozen=True)
class Documents:
    """How to tell documents apart."""

    eos_id: int
    """Token that stands in front of each."""
    room: int = SMALLEST_ROOM
    """Most documents of a micro-batch, where they are listed (`packed_sequences`): a CUDA graph needs lists of one length."""


def room_for(documents: int) -> int:
    """The room to give to that many: a power of two, so that it seldom changes."""
    return max(SMALLEST_ROOM, 1 << (documents - 1).bit_length())


def count_documents(ids_ABT: Tensor, eos_id: int) -> int:
    """Documents of the micro-batch that has most of them; ids [accumulation, windows, tokens], on the host if the device is not to be
    waited for."""
    per_micro_batch_A = _begins(ids_ABT, eos_id).sum(dim=(1, 2))
    return int(per_micro_batch_A.max())


def document_starts(ids_BT: Tensor, eos_id: int) -> Tensor:
    """The token of its window with which each token's document begins [B, T] int32: the first one that it sees."""
    place_T = torch.arange(ids_BT.size(1), dtype=torch.int32, device=ids_BT.device)
    return (place_T * _begins(ids_BT, eos_id)).cummax(dim=1).values


def hidden_tokens(starts_BT: Tensor) -> Tensor:
    """The mask that Megatron-core knows [B, 1, queries, keys], True where a token must not look: ahead, and before its document."""
    place_T = torch.arange(starts_BT.size(1), device=starts_BT.device)
    return ((place_T > place_T[:, None]) | (place_T < starts_BT[:, :, None])).unsqueeze(1)


def packed_sequences(ids_BT: Tensor, documents: Documents) -> PackedSeqParams:
    """All documents of the windows one after another, as Transformer Engine's THD format wants them, without a look from the host.

    The list of their ends has `documents.room` entries; those left over are empty documents. More documents than that would go
    wrong unseen, so the device stops at them (an error in our own count).
    """
    number_N = _begins(ids_BT, documents.eos_id).flatten().cumsum(0) - 1
    # Where document i begins; beyond the last one: the end of all.
    of_document = torch.arange(documents.room + 1, device=ids_BT.device)
    ends = torch.searchsorted(number_N, of_document, out_int32=True)
    torch._assert_async(ends[-1] == ids_BT.numel())
    longest = ids_BT.size(1)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _begins(ids: Tensor, eos_id: int) -> Tensor:
    """Whether a document begins at each token; the last axis goes through a window."""
    begins = ids == eos_id
    begins.select(-1, 0).fill_(True)
    return begins


class DocumentRoom:
    """How many documents of a micro-batch a CUDA graph has room for, over the steps of a phase.

    The room grows with the first batch that needs more, and shrinks when none has needed much of it for long.
    """

    def __init__(self, documents: int):
        self.size = room_for(documents)
        self._recent: deque[int] = deque(maxlen=REMEMBERED_STEPS)

    def changes_for(self, documents: int) -> bool:
        """Note what the next step needs; True if `size` is another from here on."""
        self._recent.append(documents)
        wanted = room_for(max(self._recent))
        remembers_enough = len(self._recent) == REMEMBERED_STEPS
        if documents <= self.size and not (remembers_enough and self.size >= SHRINK_FACTOR * wanted):
            return False
        self.size = wanted
        return True
