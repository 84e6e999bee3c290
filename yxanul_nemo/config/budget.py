"""Section `budget`: hours to spend, from which a run's sizes follow."""

from pydantic import Field

from yxanul_nemo.config.base import Section


class BudgetConfig(Section):
    """What `recipe=mine` sizes a run by. What was decided is kept, so that a run goes on as it was begun."""

    hours: float | None = Field(default=None, gt=0)
    """Time for the whole of it, in hours: model, vocabulary, tokens, steps, curriculum and learning rate are chosen to fill it. Unset:
    they are as the files of `conf/` have them."""
    sizes: list[str] = Field(default_factory=list)
    """The keys that were chosen, written by the launcher."""
    because: list[str] = Field(default_factory=list)
    """Why, written by the launcher; `stage=plan` shows it."""
