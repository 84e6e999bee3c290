"""A model of ours as lm-evaluation-harness asks for one, in batches.

It gives what the harness's own `hf` model gives on the exported folder: the same ids, the same truncation, the same cut between
context and continuation. It is another class because that one holds the logits of a whole batch, [B, T, vocabulary], at once, and
by default takes one text at a time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.export.llama import generate_ids
from yxanul_nemo.export.source import Loaded

BATCH_TOKENS = 8192
"""Tokens of one forward, padding included; of a single text where that is longer."""
CHUNK_LOGITS_BYTES = 256 << 20
DEFAULT_ANSWER_TOKENS = 256
"""Longest answer where a task names none; the harness's own default."""


class HarnessModel(TemplateLM):
    """Likelihoods and greedy or sampled answers of a loaded model.

    Args:
        loaded: the model and its tokenizer.
    """

    def __init__(self, loaded: Loaded):
        super().__init__()
        self._loaded, self._device = loaded, loaded.model.device
        self._own_tokenizer, self.max_length = loaded.tokenizer, loaded.context_tokens
        self._rows = max(1, CHUNK_LOGITS_BYTES // (4 * loaded.model.config.vocab_size))

    @property
    def eot_token_id(self) -> int:
        """EOS, which also stands before each text."""
        return self._own_tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, behind EOS unless `add_special_tokens` is false, as the exported tokenizer gives them."""
        ids = self._own_tokenizer.encode(string).tolist()
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation, the continuation's log-likelihood and whether it is the greedy one.

        Requests that feed the model the same tokens, such as one-token answers to one question, share a forward.
        """
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            given = (context + continuation)[-(self.max_length + 1) :]
            asked[tuple(given[:-1])].append((number, continuation[-len(given) + 1 :]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        inputs = sorted(asked, key=len)
        for batch in _batches(inputs, [len(tokens) for tokens in inputs]):
            hidden_BTH = self._hidden(batch)
            for hidden_TH, tokens in zip(hidden_BTH, batch, strict=True):
                for number, continuation in asked[tokens]:
                    begin = len(tokens) - len(continuation)
                    found[number] = self._score(hidden_TH[begin : len(tokens)], continuation)
        return found

    def _hidden(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states [B, T, H]; padding stands at the end, where causal attention does not look."""
        ids_BT = torch.full((len(batch), max(map(len, batch))), self.eot_token_id)
        for row, tokens in enumerate(batch):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        return self._loaded.model.model(ids_BT.to(self._device), use_cache=False).last_hidden_state

    def _score(self, hidden_TH: Tensor, tokens: list[int]) -> tuple[float, bool]:
        """Log-likelihood of `tokens`, each told by the hidden state of its place, and whether each is the most likely one."""
        total, is_greedy = 0.0, True
        labels_T = torch.tensor(tokens, device=self._device)
        for hidden, labels in zip(hidden_TH.split(self._rows), labels_T.split(self._rows), strict=True):
            log_probs_TV = F.log_softmax(self._loaded.model.lm_head(hidden).float(), dim=-1)
            total += log_probs_TV.gather(1, labels[:, None]).double().sum().item()
            is_greedy = is_greedy and bool((log_probs_TV.argmax(dim=-1) == labels).all())
        return total, is_greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, behind one EOS, in windows of the context that do not overlap."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = utils.get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_likelihood
        return totals

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop sequence of each, EOS among them; prompts too long for the context lose their beginning."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], DEFAULT_ANSWER_TOKENS)
            # An answer takes at most half of the context, so that there is room for the question.
            most = min(settings["max_gen_toks"], self.max_length // 2)
            eos = self._own_tokenizer.eos_token
            stops = handle_stop_sequences(settings["until"], eos=eos)
            room = self.max_length - most
            asked = sorted(
                ((self.tok_encode(requests[n].args[0])[-room:], n) for n in numbers), key=lambda pair: len(pair[0])
            )
            for batch in _batches(asked, [len(tokens) + most for tokens, _ in asked]):
                texts = self._answers([tokens for tokens, _ in batch], stops, most, settings)
                for (_, number), text in zip(batch, texts, strict=True):
                    found[number] = postprocess_generated_text(text, stops, think_end_token=None)
        return found

    def _answers(self, prompts: Sequence[Sequence[int]], stops: list[str], most: int, settings: Any) -> list[str]:
        longest, eos_id = max(map(len, prompts)), self.eot_token_id
        ids_BT = torch.tensor([[eos_id] * (longest - len(tokens)) + list(tokens) for tokens in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])
        sampling = {"do_sample": True, "temperature": settings["temperature"]} if settings["do_sample"] else {}
        chosen = GenerationConfig(max_new_tokens=most, eos_token_id=eos_id, pad_token_id=eos_id, **sampling)
        ends = StoppingCriteriaList([_StopTexts(self._own_tokenizer, stops, longest)])
        made_BT = generate_ids(
            self._loaded.model, ids_BT.to(self._device), chosen, mask_BT=mask_BT.to(self._device), stopping=ends
        )
        return [self._own_tokenizer.decode(tokens) for tokens in made_BT[:, longest:].tolist()]


class _StopTexts(StoppingCriteria):
    """Ends each text of a batch at the first of some stop sequences, which tokens may hold with other text around them."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str], prompt_tokens: int):
        self._tokenizer, self._stops, self._prompt_tokens = tokenizer, stops, prompt_tokens
        # A token is at least one byte of text.
        self._tail_tokens = max((len(stop.encode()) for stop in stops), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended, [B]."""
        new_BT = input_ids[:, self._prompt_tokens :][:, -self._tail_tokens :].tolist()
        texts = [self._tokenizer.decode(tokens) for tokens in new_BT]
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _batches[Item](items: Sequence[Item], lengths: Sequence[int]) -> list[list[Item]]:
    """`items`, sorted by length, in batches of at most `BATCH_TOKENS`, each counted as long as its last."""
    batches: list[list[Item]] = []
    for item, length in zip(items, lengths, strict=True):
        if batches and (len(batches[-1]) + 1) * length <= BATCH_TOKENS:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
