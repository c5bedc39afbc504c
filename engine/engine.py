"""The engine's facade: prompts in, completions out as they finish. Knows no HTTP, queue or JSON."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from engine.compute.attention import ATTENTION_NAME, AttentionContext, attach
from engine.compute.experts import EXPERTS_NAME
from engine.compute.fetched import Fetched
from engine.compute.head import gated_head
from engine.compute.limits import check_sampling
from engine.compute.linear import attach_multiplier
from engine.compute.lockstep import gate_layers
from engine.compute.routes import Beside, Here, Route
from engine.compute.skeleton import build_skeleton, decoder_layers
from engine.config import Budgets, Completion, FinishReason, Prompt
from engine.context import max_context_tokens
from engine.errors import BudgetError, PackError, PromptError
from engine.memory.ceilings import ceilings_of
from engine.memory.checkpoint import Checkpoint, open_checkpoint
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.manifest import Pack
from engine.memory.pack import Announce, ensure_pack, load_buffers
from engine.memory.pack_plan import plan_pack
from engine.memory.retention import PackHold
from engine.memory.shapes import kv_shapes, model_shape, model_work
from engine.memory.weights import StreamedWeights
from engine.planning.cost import check_budgets
from engine.planning.flops import Work
from engine.planning.policy import Policy, Tier, needs_reload
from engine.planning.shape import ModelShape
from engine.sweep.block import Block
from engine.sweep.call_log import CallLog
from engine.sweep.executor import Executor
from engine.sweep.micro_batches import MicroBatches
from engine.sweep.recorder import Recorder
from engine.sweep.report import Report
from engine.sweep.rows import Row
from engine.timeline import Timeline
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
        shape: ModelShape,
        budgets: Budgets,
        work: Work,
        timeline: Timeline,
        recorder: Recorder,
    ) -> None:
        self.policy = policy
        self.shape = shape
        self.work = work
        self.budgets = budgets
        """What the policy was checked against: disk that is read in place counts as room."""
        self.tokenizer = tokenizer
        self._eos_token_ids = frozenset((*checkpoint.eos_token_ids, *tokenizer.eos_token_ids))
        self._vocab_size = int(checkpoint.config.get_text_config().vocab_size)
        self._recorder = recorder
        device = _device(policy.compute)
        layers = decoder_layers(model)
        shapes = kv_shapes(checkpoint.config)
        caches = _caches(shapes, policy, budgets.spill_dir)
        # A row never outgrows what keys and values have room for.
        self.max_context_tokens = min(
            max_context_tokens(checkpoint.config), max(cache.num_tokens for cache in caches)
        )
        self._context = AttentionContext(
            {cache.tier: _route(cache, policy, timeline) for cache in caches}
        )
        attach(model, self._context)
        gate_layers(layers)
        with contextlib.ExitStack() as undo:
            undo.callback(self._context.close)
            self._hold = PackHold(pack.path.parent)
            undo.callback(self._hold.close)
            self._weights = StreamedWeights(pack, model, policy, device=device, timeline=timeline)
            undo.callback(self._weights.close)
            load_buffers(pack, model)
            model.to(device)  # buffers: every parameter is there already
            multiplier = attach_multiplier(
                model, dtype=getattr(torch, policy.compute_dtype), device=device
            )
            recorder.gemm_chosen(multiplier.gemm.reason)
            head = gated_head(model, self._weights, multiplier)
            undo.pop_all()
        self._block = Block(caches, max_rows=policy.block_rows, on_preempt=recorder.preempted)
        self._micro_batches = MicroBatches(
            policy, self._context, spill_dir=budgets.spill_dir, device=device
        )
        self._executor = Executor(
            model,
            num_layers=len(layers),
            num_attentions=len(shapes),
            weights=self._weights,
            head=head,
            context=self._context,
            micro_batches=self._micro_batches,
            eos_token_ids=sorted(self._eos_token_ids),
            device=device,
            work=work,
            timeline=timeline,
        )

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        budgets: Budgets,
        policy: Policy | PolicyMaker,
        progress: Progress | None = None,
        timeline: Timeline | None = None,
        call_log: Path | None = None,
        announce: Announce | None = None,
    ) -> Self:
        """Open, plan, pack if need be, place and bind. `policy` is one, or plans one from the shape.

        `announce` is told what packing will cost, before it starts. `timeline` gets every span and
        is closed with the engine; `call_log` is a file that grows by a JSON line for each call and
        sweep. A pack found damaged is written anew, once. Raises EngineError: CheckpointError,
        UnsupportedModelError, BudgetError (before a byte is written), PackError.
        """
        opened = open_checkpoint(checkpoint)
        load = functools.partial(
            cls._load,
            opened,
            budgets=budgets,
            policy=policy,
            progress=progress,
            timeline=timeline or Timeline(),
            call_log=call_log,
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
        timeline: Timeline,
        call_log: Path | None,
        announce: Announce | None,
    ) -> Self:
        dtype = torch.float32 if not budgets.gpu_bytes else opened.stored_dtype
        model = build_skeleton(
            opened.config, attention=ATTENTION_NAME, experts=EXPERTS_NAME, dtype=dtype
        )
        plan = plan_pack(
            opened,
            model,
            spill_dir=budgets.spill_dir,
            disk_bytes=budgets.disk_bytes,
            in_place=True,
        )
        shape = model_shape(plan.groups, model, opened.config, dtype=dtype)
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
            shape=shape,
            budgets=roomy,
            work=model_work(plan.groups, opened.config, dtype=dtype),
            timeline=timeline,
            recorder=Recorder(
                policy_reason=chosen.reason,
                ceilings=ceilings_of(pack, chosen),
                spill_dir=budgets.spill_dir,
                timeline=timeline,
                call_log=CallLog(call_log),
            ),
        )

    @property
    def block_rows(self) -> int:
        return self.policy.block_rows

    @property
    def num_rows(self) -> int:
        return self._block.num_rows

    def adopt(self, policy: Policy) -> None:
        """Go on under a policy of other block rows, sweep tokens, micro-batch tokens, fetch tokens or
        reason; rows of the block stay. Raises BudgetError where it does not fit, or where anything
        else differs: that takes another engine.
        """
        if fixed := needs_reload(self.policy, policy):
            raise BudgetError(f"an engine that is loaded cannot change its {', '.join(fixed)}")
        check_budgets(self.shape, policy, self.budgets)
        self.policy = self._micro_batches.policy = policy
        self._block.max_rows = policy.block_rows
        self._recorder.policy_adopted(policy.reason)

    def check(self, prompt: Prompt) -> None:
        """Raises PromptError if the prompt cannot run, alone in an empty block."""
        token_ids, max_tokens = prompt.token_ids, prompt.sampling.max_tokens
        if not token_ids:
            raise PromptError("The prompt is empty.", code="invalid_value", param="prompt")
        check_sampling(
            prompt.sampling, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids
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
        """Let the prompt's rows wait for places in the block. Raises PromptError."""
        self.check(prompt)
        limit = len(prompt.token_ids) + prompt.sampling.max_tokens
        for index in range(prompt.sampling.n):
            self._block.add(Row(prompt=prompt, index=index, limit_tokens=limit))
        self._recorder.submitted(prompt)

    def cancel(self, key: str) -> None:
        """Drop a prompt's rows, waiting or running; no further completion of it will come."""
        self._block.drop(key)
        self._recorder.cancelled(key)

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
        with self._recorder.sweeping(shares):
            tokens = self._executor.run(shares)
            completions = self._block.finish(
                shares, tokens, is_end=self._reason_to_end, complete=self._complete
            )
        self._recorder.swept(
            shares,
            num_generated=len(tokens),
            completions=completions,
            pages_in_use=self._block.num_pages_in_use,
        )
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
        """Since the engine was loaded; two of them can be subtracted."""
        return self._recorder.report(
            self._weights.counters,
            preempted_rows=self._block.num_preempted,
            shared_tokens=self._block.num_shared_tokens,
        )

    def close(self) -> None:
        self._weights.close()
        self._context.close()
        self._micro_batches.close()
        self._recorder.close()
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
        if self._ends(row, token):
            return FinishReason.STOP
        if sampling.stop and len(row.generated) >= sampling.min_tokens and self._stops(row):
            return FinishReason.STOP
        if row.num_tokens >= row.limit_tokens:
            return FinishReason.LENGTH
        return None

    def _ends(self, row: Row, token: int) -> bool:
        return token in row.prompt.sampling.end_token_ids(self._eos_token_ids)

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
        num_kept = len(row.generated) - self._ends(row, row.generated[-1])
        token_ids = row.generated[:num_kept]
        text = self.tokenizer.decode(token_ids)
        end = self._stop_at(row, text) if reason is FinishReason.STOP else None
        asked = row.prompt.sampling.logprobs is not None
        return Completion(
            key=row.prompt.key,
            index=row.index,
            token_ids=tuple(token_ids),
            text=text[:end],
            finish_reason=reason,
            num_prompt_tokens=len(row.prompt.token_ids),
            num_generated=len(row.generated),
            logprobs=tuple(row.logprobs[:num_kept]) if asked else None,
        )


def _caches(shapes: Sequence[KVShape], policy: Policy, spill_dir: Path) -> list[KVCache]:
    """One for each tier that keys and values get bytes of, fastest first."""
    caches = [
        KVCache(
            shapes,
            budget_bytes=policy.kv[tier],
            dtype=getattr(torch, policy.compute_dtype),
            tier=tier,
            spill_dir=spill_dir,
        )
        for tier in Tier
        if policy.kv[tier]
    ]
    return [cache for cache in caches if cache.num_tokens]


def _route(cache: KVCache, policy: Policy, timeline: Timeline) -> Route:
    if cache.tier is policy.compute:
        return Here(cache, timeline)
    if policy.attends_beside:
        return Beside(cache, timeline)
    return Fetched(cache, device=_device(policy.compute), timeline=timeline)


def _device(tier: Tier) -> torch.device:
    return torch.device("cuda" if tier is Tier.GPU else "cpu")
