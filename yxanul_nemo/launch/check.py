"""`stage=check`: what this machine can do, what the recipe would use here, and whether it can run at all."""

import platform
import shutil
from collections.abc import Iterator

import torch

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.kernels.attention_limits import dtype_name
from yxanul_nemo.log import logger
from yxanul_nemo.machine.environment import describe_environment
from yxanul_nemo.machine.runtime import check_precision, formats_of, resolve_device, resolve_layer_spec, te_version
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.documents import TYPICAL_DOCUMENT_TOKENS, room_for
from yxanul_nemo.model.layer_choices import attention_of, lists_documents
from yxanul_nemo.model.memory import MOST_MICRO_BATCH_TOKENS
from yxanul_nemo.plan.needs import missing_needs
from yxanul_nemo.plan.preflight import needs_of

PRECISIONS = ("fp32", "bf16", "fp8_hybrid", "fp8_e4m3", "fp8_current", "mxfp8")
PROBE_VOCAB, PROBE_WINDOWS, PROBE_SEQ_LEN = 1024, 4, 128


def check_machine(config: RunConfig) -> bool:
    """Log what the run needs and what is here, and try one layer in each precision; True if the recipe can run."""
    for need in needs_of(config):
        logger.info("%-8s %s: %s%s", need.state, need.what, need.found, f". {need.command}" if need.command else "")
    for line in describe_machine():
        logger.info("%s", line)
    try:
        device = resolve_device(config.parallel)
        spec = resolve_layer_spec(config.parallel, device)
        formats = formats_of(config.precision, config.parallel, device)
        check_precision(config.precision.named(formats[0]), config.parallel, device)
    except UserError as error:
        logger.info("this recipe cannot run here: %s", error)
        return False
    logger.info("recipe %s: %s on %s with %s layers", config.run.name, " or ".join(formats), device, spec)
    if spec == "te":
        for line in describe_attention(config):
            logger.info("%s", line)
    results = {name: probe_precision(config, name) for name in PRECISIONS}
    for name, result in results.items():
        logger.info("precision %-11s %s", name, result)
    for name in formats:
        if results[name] != "works":
            logger.info("this recipe cannot run here: precision %s %s", name, results[name])
            return False
    missing = missing_needs(config)
    for problem in missing:
        logger.info("this recipe cannot run yet: %s", problem)
    if not missing:
        logger.info("this recipe can run here")
    return not missing


def describe_machine() -> Iterator[str]:
    """Hardware and libraries, a line each."""
    environment = describe_environment()
    memory_gib = environment["memory_bytes"] / 2**30
    yield f"system      {environment['system']}, Python {platform.python_version()}"
    yield f"cpu         {environment['cpu']}, {environment['cpu_cores']} cores, {memory_gib:.0f} GiB"
    disk = shutil.disk_usage(".")
    yield f"disk        {disk.free / 2**30:.0f} GiB free here"
    packages = environment["packages"]
    yield "packages    " + ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    if not torch.cuda.is_available():
        yield "gpu         none that torch can use"
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield (
            f"gpu {i}       {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} "
            f"multiprocessors, compute capability {properties.major}.{properties.minor}"
        )
    yield f"driver      {', '.join(sorted({gpu.rpartition(', ')[2] for gpu in environment['gpus']})) or 'unknown'}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield f"cuda        {torch.version.cuda}, cuDNN {_cudnn_version()}, NCCL {nccl}"
    yield f"te          {te_version() or 'not installed'}"


def _cudnn_version() -> str:
    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError as error:
        # torch refuses a library other than its own; Transformer Engine may use it all the same.
        return f"not torch's ({str(error).partition('. ')[0]})"


def describe_attention(config: RunConfig) -> Iterator[str]:
    """Which attention the layers of Transformer Engine take at each sequence length of the recipe."""
    from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionParams, get_attention_backend

    capability = torch.cuda.get_device_capability()
    dtype = torch.float32 if config.precision.name == "fp32" else torch.bfloat16
    trained = {phase.seq_len for phase in config.curriculum.phases}
    # Validation is of single documents, which need no mask.
    cases = {(seq_len, config.data.document_mask) for seq_len in trained} | {(config.validation.eval_len, False)}
    for seq_len, masked in sorted(cases):
        where = f"attention   seq_len {seq_len:>5}{' inside documents' if masked else ''}"
        kernel = attention_of(config.model, config.precision, config.parallel, seq_len, capability)
        if kernel is not None:
            yield f"{where}: {kernel}"
            continue
        windows = max(1, MOST_MICRO_BATCH_TOKENS // seq_len)
        lists = masked and lists_documents(dtype_name(dtype), seq_len, kernel)
        tokens = windows * seq_len if lists else 0
        params = AttentionParams(
            qkv_dtype=dtype,
            qkv_layout="thd_thd_thd" if lists else "sbhd_sbhd_sbhd",
            batch_size=room_for(windows + tokens // TYPICAL_DOCUMENT_TOKENS) if lists else windows,
            num_tokens_q=tokens,
            num_tokens_kv=tokens,
            num_heads=config.model.num_attention_heads,
            num_gqa_groups=config.model.kv_groups,
            max_seqlen_q=seq_len,
            max_seqlen_kv=seq_len,
            head_dim_qk=config.model.head_dim,
            head_dim_v=config.model.head_dim,
            attn_mask_type="padding_causal" if lists else "arbitrary" if masked else "causal",
        )
        flash, _, fused, _, unfused, _ = get_attention_backend(params)
        chosen = "FlashAttention" if flash else "cuDNN fused" if fused else "unfused" if unfused else "none"
        warning = "  (slow, and memory grows with the square of the length)" if chosen == "unfused" else ""
        yield f"{where}: {chosen}{warning}"


def probe_precision(config: RunConfig, name: str) -> str:
    """`works` after a forward and backward of one layer that gives finite gradients, else the reason why not."""
    precision = PrecisionConfig(name=name)
    shape = config.model.model_copy(update={"num_layers": 1})
    try:
        model = build_model(shape, PROBE_VOCAB, precision, config.parallel, config.run.seed, seq_len=PROBE_SEQ_LEN)
    except UserError as error:
        return f"cannot: {error.problem}"
    device = resolve_device(config.parallel)
    ids_BT = torch.randint(0, PROBE_VOCAB, (PROBE_WINDOWS, PROBE_SEQ_LEN), device=device)
    try:
        model(ids_BT, ids_BT).mean().backward()
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0][:200]}"
    finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    return "works" if finite else "fails: gradients are not finite"
