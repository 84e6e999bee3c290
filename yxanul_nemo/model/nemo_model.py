"""The model's face to NeMo: a `ModelPT` that writes and reads `.nemo` files (NeMo 1 style: a tar of configuration, weights, tokenizer).

NeMo 3.0 instantiates only targets in its own namespaces; restoring through this class is the sanctioned way around that guard
for one class, without opening it for others.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.safe_config import read_config
from yxanul_nemo.export.safe_tar import safe_extract
from yxanul_nemo.model.build import build_model, reference_precision

CONFIG_MEMBER, WEIGHTS_MEMBER = "model_config.yaml", "model_weights.ckpt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
ALLOWED_MEMBERS = (CONFIG_MEMBER, WEIGHTS_MEMBER, *(f"*_{name}" for name in TOKENIZER_FILES))
EXTRA_STATE = "_extra_state"


class YxanulModel(ModelPT):
    """A trained GPT with its tokenizer. `forward` gives logits or losses as `YxanulGPT` does.

    Args:
        cfg: `gpt` (a ModelConfig), `vocab_size`, `tokenizer_fingerprint`, and `tokenizer_files` (name -> path).
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None):
        super().__init__(cfg, trainer)
        self.shape = ModelConfig.model_validate(OmegaConf.to_container(cfg.gpt))
        precision, parallel = reference_precision()
        self.gpt = build_model(self.shape, int(cfg.vocab_size), precision, parallel, seed=0)
        self.tokenizer = self._register_tokenizer(cfg)

    def forward(self, ids_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size], or the loss of each label [B, T]."""
        return self.gpt(ids_BT, labels_BT)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights only: Megatron-core's `_extra_state` is no tensor, and NeMo reads weights with an unpickler that takes only tensors."""
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.endswith(EXTRA_STATE)}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load all weights; a missing, unknown or misshapen one is an error that names it, whatever `strict` says."""
        expected = self.state_dict()
        problems = [f"lacks '{name}'" for name in expected if name not in state_dict]
        problems += [f"has the unknown '{name}'" for name in state_dict if name not in expected]
        problems += [
            f"has '{name}' as {list(state_dict[name].shape)} instead of {list(weight.shape)}"
            for name, weight in expected.items()
            if name in state_dict and state_dict[name].shape != weight.shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError("model_weights.ckpt", "; ".join(problems[:3]) + more, "the weights that model_config.yaml describes")
        with torch.no_grad():
            for name, weight in expected.items():
                weight.copy_(state_dict[name])
        return [], []

    @classmethod
    def from_config_dict(cls, config: DictConfig, trainer: Trainer | None = None) -> "YxanulModel":
        """Build this class, whatever target the configuration names; NeMo would refuse targets outside its namespaces."""
        return cls(cfg=config, trainer=trainer)

    @classmethod
    def restore_from(cls, restore_path: str, *args: Any, **kwargs: Any) -> "YxanulModel":
        """`ModelPT.restore_from` on an archive that is unpacked and checked first.

        Raises:
            UserError: no such file, an unsafe or damaged archive, or weights or tokenizer that don't belong to its configuration.
        """
        path = Path(restore_path)
        if not path.is_file():
            raise UserError(path, "does not exist", "a .nemo file")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "nemo"
            safe_extract(path, folder, ALLOWED_MEMBERS)
            check_nemo_config(path, folder / CONFIG_MEMBER)
            connector = TensorsOnlyConnector()
            connector.model_extracted_dir = str(folder)
            kwargs["save_restore_connector"] = connector
            return super().restore_from(str(path), *args, **kwargs)

    @classmethod
    def list_available_models(cls) -> list:
        """No models are published."""
        return []

    def setup_training_data(self, train_data_config: Any) -> None:
        """Training belongs to the launcher."""
        raise UserError("train_ds", "is set", "none", "Train with `python launcher.py stage=train`.")

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Validation belongs to the launcher."""
        raise UserError("validation_ds", "is set", "none", "Validate with `python launcher.py stage=validate`.")

    def _register_tokenizer(self, cfg: DictConfig) -> Tokenizer:
        """Make the files artifacts of the archive, and load them under their own names, which the archive changes."""
        with tempfile.TemporaryDirectory() as scratch:
            for key, source in cfg.tokenizer_files.items():
                name = key.replace("__", ".")
                shutil.copyfile(self.register_artifact(f"tokenizer_files.{key}", source), Path(scratch) / name)
            tokenizer = Tokenizer.load(Path(scratch))
            # Read what is needed from disk before the folder goes.
            fingerprint = tokenizer.fingerprint
        if fingerprint != cfg.tokenizer_fingerprint:
            raise UserError(
                "tokenizer", f"has the fingerprint {fingerprint[:16]}", f"{cfg.tokenizer_fingerprint[:16]}, which the model was trained with"
            )
        return tokenizer


class TensorsOnlyConnector(SaveRestoreConnector):
    """Reads weights with weights_only=True in any case; NeMo's own obeys TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD (nemo_toolkit 3.0)."""

    @staticmethod
    def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> dict[str, Tensor]:
        return torch.load(model_weights, map_location=map_location, weights_only=True)


def nemo_config(model: ModelConfig, vocab_size: int, tokenizer_folder: Path) -> DictConfig:
    """The configuration of a YxanulModel for a model and a folder with its tokenizer."""
    files = {
        name.replace(".", "__"): str(tokenizer_folder / name) for name in TOKENIZER_FILES if (tokenizer_folder / name).is_file()
    }
    return OmegaConf.create(
        {
            "gpt": model.model_dump(),
            "vocab_size": vocab_size,
            "tokenizer_fingerprint": Tokenizer.load(tokenizer_folder).fingerprint,
            "tokenizer_files": files,
        }
    )


def check_nemo_config(archive: Path, path: Path) -> None:
    """Refuse a configuration that would make NeMo or Hydra instantiate anything but this class."""
    if not path.is_file():
        raise UserError(archive, f"holds no {CONFIG_MEMBER}", "a .nemo file written by stage=export")
    loaded = read_config(path, allowed_targets=(f"{YxanulModel.__module__}.{YxanulModel.__qualname__}",))
    for key in ("gpt", "vocab_size", "tokenizer_fingerprint", "tokenizer_files"):
        if key not in loaded:
            raise UserError(archive, f"has no '{key}' in its {CONFIG_MEMBER}", "a .nemo file written by stage=export")
