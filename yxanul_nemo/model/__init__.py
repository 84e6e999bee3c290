"""The model: Megatron-core's GPT with a factorized tied embedding, and its face to NeMo.

Importing this package makes `YxanulModel` known without loading NeMo until it is used, so that
`from yxanul_nemo.model import YxanulModel; YxanulModel.restore_from("model.nemo")` is all that a fresh process needs.
"""

from typing import Any

__all__ = ["YxanulModel"]


def __getattr__(name: str) -> Any:
    if name == "YxanulModel":
        from yxanul_nemo.model.nemo_model import YxanulModel

        return YxanulModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
