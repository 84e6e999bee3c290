"""Choice of the backend: the one place where training asks which device it is on."""

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.model.documents import Documents
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.backend import Backend


def make_backend(model: YxanulGPT, config: RunConfig, device: str, eos_id: int | None = None) -> Backend:
    """The backend for `device` (`cpu` or `cuda`).

    Args:
        eos_id: token between documents, which `data.document_mask` needs.
    """
    assert eos_id is not None or not config.data.document_mask
    documents = Documents(eos_id) if eos_id is not None and config.data.document_mask else None
    if device == "cuda":
        from yxanul_nemo.training.cuda_backend import CudaBackend

        return CudaBackend(model, config, documents)
    from yxanul_nemo.training.cpu_backend import CpuBackend

    return CpuBackend(model, config.optim, config.parallel, config.guards, documents)
