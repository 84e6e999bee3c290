"""Results of validation: which belong to a checkpoint and to the settings now in force, and what follows from them for the blend and for
an early stop. Light, for the launcher."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.run_folder import RunFolder


def phase_result_path(run_dir: Path, number: int) -> Path:
    """The validation at the end of a phase."""
    return RunFolder(run_dir).phase_result(number)


def in_phase_result_path(run_dir: Path, number: int, tokens: int) -> Path:
    """A validation inside a phase, after `tokens` of the run."""
    return RunFolder(run_dir).in_phase_result(number, tokens)


def in_phase_results(run_dir: Path) -> list[tuple[int, Path]]:
    """(tokens of the run, file) of all validations inside phases, in order."""
    return RunFolder(run_dir).in_phase_results()


DECIDES_NOTHING = {
    "batch_tokens",
    "dir",
    "every_tokens",
    "every_documents",
    "best_metric",
    "early_stop_patience",
    "early_stop_min_improvement",
}
"""Keys of `validation` that change when validation happens and what follows from it, but no result of a checkpoint."""


def settings_fingerprint(config: RunConfig) -> str:
    """Of the settings that a result depends on."""
    settings = config.validation.model_dump(mode="json", exclude=DECIDES_NOTHING)
    return fingerprint(settings | {"dir": str(config.validation.dir)})


def find_result(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """A result of this checkpoint under the present settings, or None."""
    wanted = {"checkpoint_digest": checkpoint.manifest.digest, "settings_fingerprint": settings_fingerprint(config)}
    for path in sorted(config.run.folder.validation.glob("*.json")):
        try:
            result = parse_json(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(result, dict) and wanted.items() <= result.items():
            return result
    return None


def read_tokens(path: Path) -> int | None:
    """Return the tokens of the run after which a result was made; None where the file is no result."""
    try:
        return int(parse_json(path.read_text(encoding="utf-8"))["tokens_total"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def last_mean(config: RunConfig) -> float | None:
    """Return mean bits per byte at the end of the last phase that was validated; None where none was."""
    for number in range(len(config.curriculum.phases), 0, -1):
        path = phase_result_path(config.run.dir, number)
        try:
            return float(parse_json(path.read_text(encoding="utf-8"))["mean_bits_per_byte"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def metric_of(result: Mapping[str, Any], metric: str) -> float:
    """The value that `validation.best_metric` names; lower is better."""
    domain, dot, field = metric.rpartition(".")
    return float(result["domains"][domain][field] if dot else result[metric])


def ratios_after(run_dir: Path, number: int, tokens: int) -> dict[str, float]:
    """Surprise ratios of bits per byte, by domain, as recorded at the end of phase `number`.

    Args:
        tokens: of the run, at that end.

    Raises:
        UserError: it is missing or of another state.
    """
    path = phase_result_path(run_dir, number)
    fix = f"Run `python launcher.py stage=train phases={number}`, which validates again, or set curriculum.adapt_blend=false."
    try:
        result = parse_json(path.read_text(encoding="utf-8"))
        if result["tokens_total"] != tokens:
            raise UserError(path, f"is of {result['tokens_total']:,} tokens", f"{tokens:,}, where the run stands", fix)
        ratios = {name: float(ratio) for name, ratio in result["surprise_ratio_bits_per_byte"].items()}
    except FileNotFoundError:
        raise UserError(path, "does not exist", "the validation that adapts the blend of the next phase", fix) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"cannot be read ({error})", "a validation result", fix) from None
    return ratios


def surprise_ratios(values: Mapping[str, float]) -> dict[str, float]:
    """Each domain's value over the mean of all: of perplexities as the recipe's author defines it, or of bits per byte, where domains
    compare fairly (perplexity per token depends on how long the tokens of a domain are)."""
    mean = sum(values.values()) / len(values)
    return {name: value / mean for name, value in values.items()}


def advice(ratio: float) -> str:
    """What a surprise ratio suggests; between the bounds, nothing."""
    if ratio > 1.5:
        return "struggles: more of its data"
    if ratio > 1.3:
        return "more of its data"
    if ratio < 0.8:
        return "excels: less of its data"
    if ratio < 0.85:
        return "less of its data"
    return ""


def early_stop_tokens(config: RunConfig) -> int | None:
    """Tokens of the run after which so many validations inside phases in a row had not improved `validation.best_metric`.

    It follows from the recorded results alone, so that a run that is killed and repeated ends at the same step. None: go on.
    """
    patience, best, waited = config.validation.early_stop_patience, math.inf, 0
    if patience is None:
        return None
    for tokens, path in in_phase_results(config.run.dir):
        try:
            value = metric_of(parse_json(path.read_text(encoding="utf-8")), config.validation.best_metric)
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


def result_table(result: Mapping[str, Any]) -> str:
    """Return a validation result as text, one line per domain; the surprise ratio is that of bits per byte."""
    lines = [f"{'domain':<12}{'docs':>6}{'tokens':>10}{'bits/byte':>11}{'+-':>8}{'perplexity':>12}{'surprise':>10}"]
    for name, score in result["domains"].items():
        ratio = result["surprise_ratio_bits_per_byte"][name]
        lines.append(
            f"{name:<12}{score['documents']:>6}{score['tokens']:>10,}{score['bits_per_byte']:>11.4f}"
            f"{score['bits_per_byte_standard_error']:>8.4f}{score['perplexity']:>12.2f}{ratio:>10.3f}  {advice(ratio)}".rstrip()
        )
    lines.append(f"{'mean':<28}{result['mean_bits_per_byte']:>11.4f}")
    if (own := result.get("at_phase_len")) is not None:
        label = f"mean at {own['eval_len_tokens']} tokens"
        lines.append(f"{label:<28}{own['mean_bits_per_byte']:>11.4f}")
    return "\n".join(lines)
