"""The engine's facade: prompts in, completions out as they finish. Knows no HTTP, queue or JSON."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from engine.compute.attention import ATTENTION_NAME, AttentionContext, attach
from engine.compute.lockstep import gate_layers
from engine.compute.skeleton import build_skeleton, decoder_layers
from engine.config import Budgets, Completion, FinishReason, Prompt
from engine.context import max_context_tokens
from engine.errors import PackError, PromptError
from engine.memory.checkpoint import Checkpoint, open_checkpoint
from engine.memory.kv_cache import KVCache
from engine.memory.manifest import Pack
from engine.memory.pack import Announce, ensure_pack, load_buffers
from engine.memory.pack_plan import plan_pack
from engine.memory.retention import PackHold
from engine.memory.shapes import kv_shapes, model_shape
from engine.memory.weights import StreamedWeights
from engine.planning.cost import check_budgets
from engine.planning.policy import Policy, Tier
from engine.planning.shape import ModelShape
from engine.sweep.block import Block, Row, Share
from engine.sweep.executor import Executor
from engine.sweep.report import Report
from engine.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
PolicyMaker = Callable[[ModelShape, Budgets], Policy]


_STOP_MARGIN_TOKENS: Final = 8
"""Beyond one token for each byte of a stop string: tokens that decode to nothing on their own."""


class Engine:
    """Carries a block of rows over one model. Not thread-safe. Close it.

    Between sweeps prompts may be submitted and cancelled; `sweep` returns the rows that finished.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        pack: Pack,
        model: Any,  # transformers' models are untyped
        tokenizer: Tokenizer,
        policy: Policy,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self._eos_token_ids = frozenset((*checkpoint.eos_token_ids, *tokenizer.eos_token_ids))
        self._vocab_size = int(checkpoint.config.get_text_config().vocab_size)
        self._report = Report(policy_reason=policy.reason)
        device = _device(policy.compute)
        layers = decoder_layers(model)
        self._cache = KVCache(
            kv_shapes(checkpoint.config),
            budget_bytes=policy.kv_bytes,
            dtype=getattr(torch, policy.compute_dtype),
            device=_device(policy.kv_tier),
        )
        # A row never outgrows what keys and values have room for.
        self.max_context_tokens = min(max_context_tokens(checkpoint.config), self._cache.num_tokens)
        context = AttentionContext(self._cache)
        attach(model, context)
        gate_layers(layers)
        with contextlib.ExitStack() as undo:
            self._hold = PackHold(pack.path.parent)
            undo.callback(self._hold.close)
            self._weights = StreamedWeights(
                pack, model, splits=policy.layer_splits, compute=policy.compute, device=device
            )
            undo.callback(self._weights.close)
            load_buffers(pack, model)
            model.to(device)  # buffers: every parameter is there already
            undo.pop_all()
        self._block = Block(self._cache, max_rows=policy.block_rows)
        self._executor = Executor(
            model,
            num_layers=len(layers),
            weights=self._weights,
            context=context,
            micro_batch_tokens=policy.micro_batch_tokens,
            eos_token_ids=sorted(self._eos_token_ids),
            device=device,
        )

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        budgets: Budgets,
        policy: Policy | PolicyMaker,
        progress: Progress | None = None,
        announce: Announce | None = None,
    ) -> Self:
        """Open, plan, pack if need be, place and bind. `policy` is one, or plans one from the shape.

        `announce` is told what packing will cost, before it starts. A pack found damaged is written anew, once. Raises EngineError: CheckpointError,
        UnsupportedModelError, BudgetError (before a byte is written), PackError.
        """
        opened = open_checkpoint(checkpoint)
        load = functools.partial(
            cls._load,
            opened,
            budgets=budgets,
            policy=policy,
            progress=progress,
            announce=announce,
        )
        try:
            return load()
        except PackError:
            return load()

    @classmethod
    def _load(
        cls,
        opened: Checkpoint,
        *,
        budgets: Budgets,
        policy: Policy | PolicyMaker,
        progress: Progress | None,
        announce: Announce | None,
    ) -> Self:
        dtype = torch.float32 if not budgets.gpu_bytes else opened.stored_dtype
        model = build_skeleton(opened.config, attention=ATTENTION_NAME, dtype=dtype)
        plan = plan_pack(
            opened,
            model,
            spill_dir=budgets.spill_dir,
            disk_bytes=budgets.disk_bytes,
            in_place=True,
        )
        shape = model_shape(plan.groups, opened.config, dtype=dtype)
        # What is read in the source's files takes no room of ours.
        roomy = dataclasses.replace(budgets, disk_bytes=budgets.disk_bytes + plan.in_place_bytes)
        chosen = policy if isinstance(policy, Policy) else policy(shape, roomy)
        check_budgets(shape, chosen, roomy)
        pack = ensure_pack(
            opened,
            model,
            spill_dir=budgets.spill_dir,
            disk_bytes=budgets.disk_bytes,
            progress=progress,
            announce=announce,
            in_place=True,
        )
        return cls(
            opened,
            pack=pack,
            model=model,
            tokenizer=Tokenizer.load(opened.source),
            policy=chosen,
        )

    @property
    def block_rows(self) -> int:
        return self.policy.block_rows

    @property
    def num_rows(self) -> int:
        return self._block.num_rows

    def check(self, prompt: Prompt) -> None:
        """Raises PromptError if the prompt cannot run, alone in an empty block."""
        token_ids, max_tokens = prompt.token_ids, prompt.sampling.max_tokens
        if not token_ids:
            raise PromptError("The prompt is empty.", code="invalid_value", param="prompt")
        if max_tokens < 1:
            raise PromptError(
                f"Invalid 'max_tokens': expected at least 1, got {max_tokens}.",
                code="integer_below_min_value",
                param="max_tokens",
            )
        if len(token_ids) + max_tokens > self.max_context_tokens:
            raise PromptError(
                f"This model's maximum context length is {self.max_context_tokens} tokens. "
                f"However, {len(token_ids) + max_tokens} were asked for ({len(token_ids)} in the "
                f"prompt, {max_tokens} in the completion).",
                code="context_length_exceeded",
                param="prompt",
            )
        unknown = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if unknown:
            raise PromptError(
                f"Token id {unknown[0]} is not in the vocabulary of {self._vocab_size} tokens.",
                code="invalid_value",
                param="prompt",
            )

    def submit(self, prompt: Prompt) -> None:
        """Let the prompt wait for a place in the block. Raises PromptError."""
        self.check(prompt)
        limit = len(prompt.token_ids) + prompt.sampling.max_tokens
        self._block.add(Row(prompt=prompt, limit_tokens=limit))

    def cancel(self, key: str) -> None:
        """Drop a row, waiting or running; no completion of it will come."""
        self._block.drop(key)

    def sweep(self) -> list[Completion]:
        """One pass over all layers for every row; the rows that finished. No rows: nothing to do.

        Raises EngineError, or what the model raised; the rows are then as they were before, and
        another sweep may be tried without those that are to blame.
        """
        shares = self._block.compose(
            sweep_tokens=self.policy.sweep_tokens,
            max_segment_tokens=self.policy.micro_batch_tokens,
        )
        if not shares:
            return []
        started_s = time.perf_counter()
        tokens = self._executor.run(shares, self._report)
        completions = self._block.finish(
            shares, tokens, is_end=self._reason_to_end, complete=self._complete
        )
        self._count(shares, tokens, completions, time.perf_counter() - started_s)
        return completions

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        """Completions as they finish, drawing on `prompts` only as the block has room."""
        source = iter(prompts)
        drained = False
        while not drained or self.num_rows:
            while not drained and self.num_rows < 2 * self.block_rows:
                prompt = next(source, None)
                if prompt is None:
                    drained = True
                else:
                    self.submit(prompt)
            yield from self.sweep()

    def report(self) -> Report:
        counters = self._weights.counters
        return dataclasses.replace(
            self._report,
            preempted_rows=self._block.num_preempted,
            weights_streamed_bytes=counters.streamed_bytes,
            weights_fetched_s=counters.fetched_s,
            weights_waited_s=counters.waited_s,
        )

    def close(self) -> None:
        self._weights.close()
        self._hold.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reason_to_end(self, row: Row, token: int) -> FinishReason | None:
        sampling = row.prompt.sampling
        if token in self._eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if sampling.stop and len(row.generated) >= sampling.min_tokens and self._stops(row):
            return FinishReason.STOP
        if row.num_tokens >= row.limit_tokens:
            return FinishReason.LENGTH
        return None

    def _stops(self, row: Row) -> bool:
        """Whether a stop string has just become whole: only the tail can have changed."""
        stop = row.prompt.sampling.stop
        tail = (
            max(len(text.encode("utf-8", "surrogatepass")) for text in stop) + _STOP_MARGIN_TOKENS
        )
        text = self.tokenizer.decode(row.generated[-tail:])
        if not any(word in text for word in stop):
            return False
        return self._stop_at(row, self.tokenizer.decode(row.generated)) is not None

    def _stop_at(self, row: Row, text: str) -> int | None:
        """Where the first stop string begins; one that was whole before `min_tokens` is only text."""
        sampling = row.prompt.sampling
        before = self.tokenizer.decode(row.generated[: max(0, sampling.min_tokens - 1)])
        found = (text.find(word, max(0, len(before) + 1 - len(word))) for word in sampling.stop)
        return min((at for at in found if at >= 0), default=None)

    def _complete(self, row: Row, reason: FinishReason) -> Completion:
        token_ids = row.generated
        ended = reason is FinishReason.STOP and token_ids[-1] in self._eos_token_ids
        if ended and not row.prompt.sampling.ignore_eos:
            token_ids = token_ids[:-1]
        text = self.tokenizer.decode(token_ids)
        end = self._stop_at(row, text) if reason is FinishReason.STOP else None
        return Completion(
            key=row.prompt.key,
            token_ids=tuple(token_ids),
            text=text[:end],
            finish_reason=reason,
            num_prompt_tokens=len(row.prompt.token_ids),
            num_generated=len(row.generated),
        )

    def _count(
        self,
        shares: Sequence[Share],
        tokens: Sequence[int],
        completions: Sequence[Completion],
        seconds: float,
    ) -> None:
        report = self._report
        report.num_sweeps += 1
        report.sweep_s += seconds
        report.generated_tokens += len(tokens)
        report.prompt_tokens += sum(map(_num_prompt_tokens, shares))
        report.completions += len(completions)
        report.peak_rows = max(report.peak_rows, len(shares))


def _num_prompt_tokens(share: Share) -> int:
    """How many of the tokens that the share has just brought to the cache are its prompt's."""
    cached = share.row.num_cached
    return max(0, min(cached, len(share.row.prompt.token_ids)) - (cached - share.num_tokens))


def _device(tier: Tier) -> torch.device:
    return torch.device("cuda" if tier is Tier.GPU else "cpu")
