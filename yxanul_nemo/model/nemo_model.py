"""The model's face to NeMo: a `ModelPT` that writes and reads `.nemo` files (a tar of configuration, weights, tokenizer).

NeMo 3.0 instantiates only targets in its own namespaces. Restoring through this class is the sanctioned way around that guard
for one class; `ModelPT.restore_from`, which would take the class from the file, refuses it until a program adds
`yxanul_nemo.model.` to `nemo.core.classes.common.ALLOWED_TARGET_PREFIXES`.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.nemo_archive import (
    TARGET,
    TOKENIZER_FILES,
    NemoArchive,
    NemoConfig,
    TokenizerPart,
    is_artifact,
    load_tokenizer,
    open_archive,
    parse_config,
    read_weights,
    unprefixed,
)
from yxanul_nemo.model.whole_weights import load_whole_weights
from yxanul_nemo.unpacking.safe_config import check_config, read_config

# NeMo's telemetry reports on import that it is off.
logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
from nemo.core import ModelPT  # noqa: E402
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector  # noqa: E402
from nemo.utils import logging as nemo_logging  # noqa: E402

_WEIGHTS_TO_COME: ContextVar[bool] = ContextVar("weights to come", default=False)


@contextmanager
def weights_to_come() -> Iterator[None]:
    """Draw no weights for models that are built in the block, because all of them are loaded next."""
    token = _WEIGHTS_TO_COME.set(True)
    try:
        yield
    finally:
        _WEIGHTS_TO_COME.reset(token)


class LoadResult(NamedTuple):
    """What `load_state_dict` of torch returns; both lists are empty here, as anything else is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class YxanulModel(ModelPT):
    """A trained GPT with its tokenizer. `forward` gives logits or losses as `YxanulGPT` does.

    It computes in FP32 with plain torch layers, on a CPU or a GPU. If Megatron-core's model parallelism is initialized, each
    tensor-parallel rank holds its part; otherwise the process is alone.

    Args:
        cfg: a `NemoConfig` as a dictionary, its tokenizer's files being paths.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None):
        super().__init__(cfg, trainer)
        described = parse_config(OmegaConf.to_container(cfg), "cfg")
        parallel_size = (
            parallel_state.get_tensor_model_parallel_world_size()
            if parallel_state.model_parallel_is_initialized()
            else 1
        )
        parallel = ParallelConfig(device="cpu", layer_spec="torch", tensor_parallel=parallel_size)
        precision = PrecisionConfig(name="fp32")
        self.gpt = build_model(
            described.gpt, described.vocab_size, precision, parallel, seed=0, drawn=not _WEIGHTS_TO_COME.get()
        )
        # NeMo's own `ModelPT.restore_from` leaves the archive's names in the configuration, and knows where it is unpacked.
        files = {
            key: Path(self.register_artifact(f"tokenizer.{key}", path) if is_artifact(key, path) else path)
            for key, path in described.tokenizer.files.items()
        }
        self.tokenizer: Tokenizer = load_tokenizer(described.tokenizer, files, "cfg")

    def forward(self, ids_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size], or the loss of each label [B, T]."""
        return self.gpt(ids_BT, labels_BT)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights only: Megatron-core's `_extra_state` is no tensor, and a `.nemo` file is read as tensors alone."""
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if isinstance(v, Tensor)}

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> LoadResult:
        """Copy whole weights into the model, or into this rank's part of it.

        A missing, unknown or misshapen weight is an error whatever `strict` says, as a model with some random weights is
        none. `assign` has no effect either: the model keeps its own tensors, on its device.

        Raises:
            UserError: names what is missing, unknown or misshapen.
        """
        load_whole_weights(self.gpt, unprefixed(state_dict, "state_dict"), "state_dict")
        return LoadResult([], [])

    def save_to(self, save_path: str) -> None:
        """Write a `.nemo` file, the tokenizer included; UserError on a rank that holds only a part of the model."""
        if self.gpt.config.tensor_model_parallel_size > 1:
            raise UserError(
                "save_to",
                f"the model is split over {self.gpt.config.tensor_model_parallel_size} ranks",
                "a model restored in one process",
            )
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer.save(Path(scratch))
            part = tokenizer_part(self.tokenizer, Path(scratch))
            self.artifacts: dict[str, Any] = {}
            with open_dict(self.cfg):
                self.cfg.tokenizer = part.model_dump(exclude_none=True)
            for key, path in part.files.items():
                self.register_artifact(f"tokenizer.{key}", path)
            super().save_to(save_path)

    @classmethod
    def from_config_dict(cls, config: DictConfig, trainer: Trainer | None = None) -> "YxanulModel":
        """Build this class, whatever target the configuration names; NeMo would refuse targets outside its namespaces."""
        return cls(cfg=config, trainer=trainer)

    @classmethod
    def restore_from(
        cls,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: SaveRestoreConnector | None = None,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> "YxanulModel | DictConfig":
        """`ModelPT.restore_from` on an archive that is unpacked and checked first.

        Args:
            restore_path: a `.nemo` file.
            override_config_path: a configuration, or a YAML file with one, in place of the archive's; `return_config` gives one
                to start from. The weights must still fit.
            map_location: device; by default the GPU where there is one, as NeMo has it.
            strict: without effect; weights are always complete.
            return_config: return the configuration and build nothing.
            save_restore_connector: without effect; the one used reads tensors only.
            trainer: passed to the constructor.
            validate_access_integrity: as NeMo has it.

        Raises:
            UserError: no such file, an unsafe or damaged archive, or weights or tokenizer that don't belong to its configuration.
        """
        with open_archive(Path(restore_path)) as archive:
            described = archive.config
            if override_config_path is not None:
                described = _override(override_config_path)
            config = described.model_dump(exclude_none=True)
            if return_config:
                return OmegaConf.create(config)
            unpacked = {key: str(path) for key, path in archive.tokenizer_files().items()}
            for key, value in described.tokenizer.files.items():
                config["tokenizer"][key] = unpacked[key] if value == archive.config.tokenizer.files.get(key) else value
            with weights_to_come():
                return super().restore_from(
                    restore_path,
                    override_config_path=OmegaConf.create(config),
                    map_location=map_location,
                    save_restore_connector=TensorsOnlyConnector(archive),
                    trainer=trainer,
                    validate_access_integrity=validate_access_integrity,
                )

    @classmethod
    def list_available_models(cls) -> list[object]:
        """No models are published."""
        return []

    def setup_training_data(self, train_data_config: Any) -> None:
        """Training belongs to the launcher."""
        raise UserError("train_ds", "is set", "none", "Train with `python launcher.py stage=train`.")

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Validation belongs to the launcher."""
        raise UserError("validation_ds", "is set", "none", "Validate with `python launcher.py stage=validate`.")


class TensorsOnlyConnector(SaveRestoreConnector):
    """NeMo's restoring from a checked archive, with weights read as tensors alone.

    The method is private in nemo_toolkit 3.0 and the only place where its reader can be replaced; NeMo's own obeys
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
    """

    def __init__(self, archive: NemoArchive):
        super().__init__()
        self.model_extracted_dir = str(archive.folder)
        self._archive_path = archive.path

    def _load_state_dict_from_disk(self, model_weights: str, map_location: Any = "cpu") -> dict[str, Tensor]:
        return read_weights(Path(model_weights), f"{self._archive_path} ({Path(model_weights).name})")


def nemo_config(model: ModelConfig, vocab_size: int, tokenizer: Tokenizer, tokenizer_folder: Path) -> DictConfig:
    """The configuration of a YxanulModel for a model and its tokenizer, which is saved in `tokenizer_folder`."""
    described = NemoConfig(gpt=model, vocab_size=vocab_size, tokenizer=tokenizer_part(tokenizer, tokenizer_folder))
    return OmegaConf.create(described.model_dump(exclude_none=True))


def tokenizer_part(tokenizer: Tokenizer, folder: Path) -> TokenizerPart:
    """A saved tokenizer as the configuration describes it, with the paths of its files."""
    files = {key: str(folder / name) for key, name in TOKENIZER_FILES.items() if (folder / name).is_file()}
    return TokenizerPart(fingerprint=tokenizer.fingerprint, library=tokenizer.library, **files)


@contextmanager
def quiet_nemo() -> Iterator[None]:
    """NeMo tells of each step on standard output; in a stage, only its errors are of interest."""
    with nemo_logging.temp_verbosity(nemo_logging.ERROR):
        yield


def _override(source: DictConfig | str) -> NemoConfig:
    if isinstance(source, str | Path):
        return parse_config(read_config(Path(source), allowed_targets=(TARGET,)), source)
    plain = OmegaConf.to_container(source, resolve=True)
    check_config(plain, allowed_targets=(TARGET,), where="override_config_path")
    return parse_config(plain, "override_config_path")
