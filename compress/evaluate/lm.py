"""lm-eval's model type ``entropress``: its Hugging Face one, without its ways of failing silently.

lm-eval imports this module when the type is asked for; `compress._autoload` tells it where it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from compress import checkpoint as room
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, did_you_mean
from compress.hf import skip_if_possible  # which also teaches transformers the format
from compress.tokens import attach_if_stored

_PASSED_ON = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "backend"),
    *("add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking"),
    "chat_template_args",
)


class EntropressLM(HFLM):
    """A causal or encoder-decoder model, coded or not, as lm-eval's requests want it.

    ``pretrained``: a directory, a hub id or ``demo:NAME``, at ``revision``. ``dtype``, ``device``:
    as `Checkpoint.load_model`. What the config names as skipped is not computed where that changes
    no bit. Log-likelihoods are taken in float32. All else as for HFLM. Raises `BadInput` for
    options that it does not have, a model without a language-model head, logits that are not finite
    and requests that do not fit into the model; weights that are missing raise `Corrupt`.
    ``truncated`` counts the requests that had to be cut from the left to fit.
    """

    def __init__(
        self,
        pretrained: str | Checkpoint,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        softmax_dtype: str = "float32",
        device: str = "auto",
        **options: Any,
    ) -> None:
        for name in options.keys() - set(_PASSED_ON):
            raise BadInput(
                f"the lm-eval model type entropress has no option '{name}'",
                mend=did_you_mean(name, _PASSED_ON),
            )
        if isinstance(pretrained, str):
            pretrained = room.open(room.resolve(pretrained, revision))
        self.source = pretrained.source
        self.truncated = 0
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval's command line asks for CUDA unless it is told otherwise
        tokenizer = pretrained.tokenizer()
        model = attach_if_stored(skip_if_possible(pretrained.load_model(dtype, device)))
        if model.get_output_embeddings() is None:
            raise BadInput("has no language-model head", where=self.source.path)
        super().__init__(model, tokenizer=tokenizer, softmax_dtype=softmax_dtype, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What results say of the model. HFLM's own would ask the hub about local names."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": self.source.revision or "",
            "model_sha": "",
        }

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len and tokens.shape[1] > left_truncate_len:
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                raise self._misfit(request.task_name, f"{wanted} tokens to generate")
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        for request in requests:
            if not request.args[1]:
                raise BadInput("an answer without text", where=request.task_name)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for _, context, answer in requests:
            if len(answer) > self.max_length:
                raise self._misfit("an answer", f"{len(answer)} tokens")
            self.truncated += len(context) + len(answer) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._checked(super()._model_call(inps, attn_mask, labels))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        return super()._model_generate(
            context, max_length, stop, logits_processor=[self._check_step], **options
        )

    def _check_step(self, _: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`_checked`, as generation calls it for each new token."""
        return self._checked(logits)

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        """The same logits. Some may be -inf; NaN and inf show as the largest."""
        largest = logits.max().item()
        if not math.isfinite(largest):
            raise BadInput("the model's logits are not finite", where=self.source.path, got=largest)
        return logits

    def _misfit(self, where: str, what: str) -> BadInput:
        return BadInput(
            "does not fit into the model", where=where, got=what, expected=f"<= {self.max_length}"
        )
