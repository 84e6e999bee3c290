"""How many documents of a micro-batch a CUDA graph has room for, over the steps of a phase."""

from collections import deque

from yxanul_nemo.model.documents import room_for

REMEMBERED_STEPS = 256
"""Steps that a room is kept for after the batch that needed it."""
SHRINK_FACTOR = 4
"""A room so many times too large is given up: attention's time grows with it, but a new graph takes seconds."""


class DocumentRoom:
    """Grows with the first batch that needs more, shrinks when none has needed much of it for long."""

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
