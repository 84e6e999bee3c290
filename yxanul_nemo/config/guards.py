"""`conf/guards`: what watches over training."""

from pydantic import Field

from yxanul_nemo.config.base import Section


class GuardsConfig(Section):
    """When an update is skipped and when a run is ended. A loss or gradient norm that is not finite is always skipped."""

    max_skips_in_a_row: int = Field(default=20, ge=1)
    """Updates skipped in a row before the run stops, with a file of the windows and documents they were about."""
    spike_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Skip an update whose loss or gradient norm is over the mean of the last steps by more than so many standard deviations; unset:
    none. Each phase begins anew, and skips none before half of `spike_window_steps`."""
    spike_window_steps: int = Field(default=128, ge=4)
    """Steps that a spike is compared with."""
    hang_minutes: float | None = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Minutes without a finished step after which each rank shows its stacks and ends; unset: never. The first step counts."""

    @property
    def hang_seconds(self) -> float | None:
        """`hang_minutes` in seconds."""
        return None if self.hang_minutes is None else 60 * self.hang_minutes
