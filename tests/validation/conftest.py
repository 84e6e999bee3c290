"""A run with large random weights and its export, as for the tests of exports."""

from tests.export.conftest import exported, make_run, one_thread

__all__ = ["exported", "make_run", "one_thread"]
