"""The user's error keeps its parts wherever it travels."""

import copy
import pickle
from pathlib import Path

import pytest

from yxanul_nemo.checkpoint.manifest import CorruptCheckpoint
from yxanul_nemo.errors import UserError

ERRORS = [
    UserError("optim.lr", "got -1", "a positive number", "Set optim.lr."),
    UserError("optim.lr", "got -1"),
    CorruptCheckpoint(Path("/runs/tokens_5"), "ledger.json", "is missing"),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301 - our own
def test_it_comes_out_of_another_process_as_it_was(error, travel):
    arrived = travel(error)
    assert type(arrived) is type(error) and str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def test_a_value_of_thousands_of_characters_is_cut_short():
    error = UserError("ledger.json", f"tokens is {'9' * 5000}, which is no number", "a number")
    assert len(str(error)) < 400
    assert "(5,001 characters) which is no number; expected a number." in str(error)
