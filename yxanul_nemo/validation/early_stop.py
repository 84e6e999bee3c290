"""`validation.early_stop_patience`: whether training is to end, as a function of what was recorded. Light, for the launcher."""

import json
import math

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.validation.record import in_phase_results, metric_of


def early_stop_tokens(config: RunConfig) -> int | None:
    """Tokens of the run after which so many validations inside phases in a row had not improved `validation.best_metric`.

    It follows from the recorded results alone, so that a run that is killed and repeated ends at the same step. None: go on.
    """
    patience, best, waited = config.validation.early_stop_patience, math.inf, 0
    if patience is None:
        return None
    for tokens, path in in_phase_results(config.run.dir):
        try:
            value = metric_of(json.loads(path.read_text(encoding="utf-8")), config.validation.best_metric)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            # Not written by us, or of domains that are no longer configured.
            continue
        if value < best - config.validation.early_stop_min_improvement:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return tokens
    return None
