"""The next token's logits for a batch of texts, with a cache of fixed size; on a GPU one CUDA graph per token.

Shape suffixes: B texts, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

from yxanul_nemo.log import logger

CACHE_STEP_TOKENS = 64
"""The cache's length is a multiple of this."""
WARMUP_PASSES = 2
"""Before the graph is recorded: cuBLAS makes its workspaces at their first use, which cannot be recorded."""


class Decoder:
    """A transformers Llama at work on a batch of texts.

    Shorter prompts are padded at the left, where no token looks, so each text gets the logits that it would get alone, up to rounding.

    Args:
        pad_id: any id of the vocabulary.
        max_tokens: most tokens of a text, its prompt included.
    """

    def __init__(self, model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], pad_id: int, max_tokens: int):
        self.model, device = model, model.device
        longest = max(map(len, prompts))
        self._length = -(-max_tokens // CACHE_STEP_TOKENS) * CACHE_STEP_TOKENS
        self._cache = StaticCache(config=model.config, max_cache_len=self._length)
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        self.prompt_BT = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
        places = torch.arange(self._length, device=device)
        # True where a query may look: [B, 1, 1, length] in a step.
        self._mask = ((places >= padding[:, None]) & (places < longest))[:, None, None, :]
        self._ids_B1 = self.prompt_BT[:, -1:].clone()
        self._position_B1 = (longest - 1 - padding)[:, None]
        self._tokens = longest
        self._graph: torch.cuda.CUDAGraph | None = None
        self._use_graph = device.type == "cuda"
        self._logits_BV: Tensor | None = None

    @property
    def uses_graph(self) -> bool:
        """Whether a step is the replay of a CUDA graph, which the first one records."""
        return self._graph is not None

    def read_prompts(self) -> Tensor:
        """Return the logits [B, V] of the token after each prompt, in FP32."""
        length = self.prompt_BT.size(1)
        places = torch.arange(length, device=self.prompt_BT.device)
        before = places[None, :] <= places[:, None]
        padded = torch.zeros(length, self._length, dtype=torch.bool, device=places.device)
        padded[:, :length] = before
        mask = padded & self._mask
        # Padding looks at itself, as attention to nothing is no number.
        mask[..., places, places] = True
        position_BT = self._position_B1 - (length - 1) + places
        return self._forward(self.prompt_BT, position_BT.clamp(min=0), mask)

    def step(self, ids_B: Tensor) -> Tensor:
        """Add one token to each text and return the logits [B, V] of the next, in FP32. The next step overwrites them."""
        self._ids_B1.copy_(ids_B[:, None])
        self._position_B1 += 1
        self._mask[..., self._tokens] = True
        self._tokens += 1
        if self._use_graph and self._graph is None:
            self._record()
        if self._graph is None:
            return self._decode()
        self._graph.replay()
        assert self._logits_BV is not None, "the graph writes there"
        return self._logits_BV

    def _decode(self) -> Tensor:
        return self._forward(self._ids_B1, self._position_B1, self._mask)

    def _forward(self, ids_BT: Tensor, position_BT: Tensor, mask: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=position_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def _record(self) -> None:
        """Record a step as a CUDA graph. What is computed on the way is written to the same places again by the replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_PASSES):
                    self._decode()
                    self._go_back()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._logits_BV = self._decode()
            self._graph = graph
        except RuntimeError as error:
            logger.warning("no CUDA graph, generating without: %s", str(error).splitlines()[0])
            self._use_graph = False
            self._go_back()

    def _go_back(self) -> None:
        """Have the cache write its next token where this step's belongs."""
        for layer in self._cache.layers:
            assert isinstance(layer, StaticLayer)
            layer.cumulative_length.fill_(self._tokens - 1)
