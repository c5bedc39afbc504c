"""The engine's facade: prompts in, completions out as they finish. Knows no HTTP, queue or JSON."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engine.admission import Admission
from engine.compute.attention import ATTENTION_NAME
from engine.compute.ceilings import ceilings_of
from engine.compute.dtypes import compute_dtype_of
from engine.compute.experts import EXPERTS_NAME
from engine.compute.limits import readable_of
from engine.compute.skeleton import build_skeleton
from engine.config import Budgets, Completion, Prompt
from engine.context import max_context_tokens
from engine.errors import BudgetError, ComputeDtypeError, EngineError, PackError
from engine.grammar import Grammars
from engine.memory.allocator import give_freed_memory_back, keep_freed_memory
from engine.memory.checkpoint import Checkpoint, open_checkpoint
from engine.memory.manifest import Pack
from engine.memory.pack import Announce, ensure_pack
from engine.memory.pack_plan import plan_pack
from engine.memory.shapes import model_shape, model_work
from engine.planning.cost import check_budgets
from engine.planning.flops import Work
from engine.planning.policy import Policy, needs_reload
from engine.planning.shape import ModelShape
from engine.sweep.assembly import Assembly, assemble
from engine.sweep.call_log import CallLog
from engine.sweep.endings import Endings
from engine.sweep.executor import Executor
from engine.sweep.recorder import Recorder
from engine.sweep.report import Report
from engine.sweep.rows import Row
from engine.timeline import Timeline
from engine.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
PolicyMaker = Callable[[ModelShape, Budgets], Policy]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What an engine's policies are decided on. In `budgets` disk that is read in place is room."""

    shape: ModelShape
    work: Work
    budgets: Budgets


class Engine:
    """Carries a block of rows over one model. Not thread-safe. Close it.

    Between sweeps prompts may be submitted and cancelled; `sweep` returns the rows that finished.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        policy: Policy,
        basis: Basis,
        tokenizer: Tokenizer,
        assembly: Assembly,
        fingerprint: str,
        recorder: Recorder,
        closing: contextlib.ExitStack,
    ) -> None:
        """`closing` closes all that the engine stands on; `fingerprint` changes with whatever may
        change an answer.
        """
        self.fingerprint = fingerprint
        self.policy = policy
        self.basis = basis
        self.tokenizer = tokenizer
        self.max_context_tokens = min(
            max_context_tokens(checkpoint.config), assembly.max_row_tokens
        )
        eos_token_ids = _eos_token_ids(checkpoint, tokenizer)
        vocab_size = int(checkpoint.config.get_text_config().vocab_size)
        self._endings = Endings(tokenizer, eos_token_ids)
        self._admission = Admission(
            vocab_size=vocab_size,
            max_context_tokens=self.max_context_tokens,
            eos_token_ids=eos_token_ids,
            grammars=Grammars(
                tokenizer, vocab_size=vocab_size, eos_token_ids=sorted(eos_token_ids)
            ),
            readable=readable_of(assembly.head),
        )
        self._block = assembly.block
        self._micro_batches = assembly.micro_batches
        self._executor: Executor | None = assembly.executor  # None: closed
        self._weight_counters = assembly.weights.counters
        self._product_counters = assembly.products
        self._recorder = recorder
        self._closing = closing

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        budgets: Budgets,
        policy: Policy | PolicyMaker,
        compute_dtype: str | None = None,
        progress: Progress | None = None,
        timeline: Timeline | None = None,
        call_log: Path | None = None,
        announce: Announce | None = None,
    ) -> Self:
        """Open, plan, pack if need be, place and bind. `policy` is one, or plans one from the shape.

        `compute_dtype` is one of `COMPUTE_DTYPES`; None is float32 on a CPU, as stored on a GPU.
        `announce` is told what packing will cost, before it starts. `timeline` gets every span and
        is closed with the engine, or where there will be none; `call_log` is a file that grows by a
        JSON line for each call and sweep. A pack found damaged is written anew, once. Raises
        EngineError: CheckpointError, UnsupportedModelError, ComputeDtypeError, BudgetError (before a
        byte is written), PackError.
        """
        keep_freed_memory()
        timeline = timeline or Timeline()
        with contextlib.ExitStack() as undo:
            undo.callback(timeline.close)
            load = functools.partial(
                cls._load,
                open_checkpoint(checkpoint),
                budgets=budgets,
                policy=policy,
                compute_dtype=compute_dtype,
                progress=progress,
                timeline=timeline,
                call_log=call_log,
                announce=announce,
            )
            try:
                engine = load()
            except PackError:
                engine = None  # outside of here nothing of the failed one is kept
            if engine is None:
                gc.collect()  # models are cycles, and the next one's weights need the room
                engine = load()
            undo.pop_all()
        give_freed_memory_back()
        return engine

    @classmethod
    def _load(
        cls,
        opened: Checkpoint,
        *,
        budgets: Budgets,
        policy: Policy | PolicyMaker,
        compute_dtype: str | None,
        progress: Progress | None,
        timeline: Timeline,
        call_log: Path | None,
        announce: Announce | None,
    ) -> Self:
        dtype = compute_dtype_of(
            compute_dtype, stored=opened.stored_dtype, on_gpu=budgets.gpu_bytes > 0
        )
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
        if chosen.compute_dtype != shape.compute_dtype:
            raise ComputeDtypeError(
                f"the policy is to compute in {chosen.compute_dtype}, the model in "
                f"{shape.compute_dtype}"
            )
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
        return cls._build(
            opened,
            model,
            pack=pack,
            policy=chosen,
            basis=Basis(
                shape=shape,
                work=model_work(plan.groups, opened.config, dtype=dtype),
                budgets=roomy,
            ),
            timeline=timeline,
            call_log=call_log,
        )

    @classmethod
    def _build(
        cls,
        opened: Checkpoint,
        model: Any,  # transformers' models are untyped
        *,
        pack: Pack,
        policy: Policy,
        basis: Basis,
        timeline: Timeline,
        call_log: Path | None,
    ) -> Self:
        tokenizer = Tokenizer.load(opened.source)
        ceilings = ceilings_of(pack, policy)
        with contextlib.ExitStack() as undo:
            recorder = Recorder(
                policy_reason=policy.reason,
                ceilings=ceilings,
                spill_dir=basis.budgets.spill_dir,
                timeline=timeline,
                call_log=undo.enter_context(contextlib.closing(CallLog(call_log))),
            )
            assembly = assemble(
                model,
                opened.config,
                pack=pack,
                policy=policy,
                work=basis.work,
                eos_token_ids=_eos_token_ids(opened, tokenizer),
                spill_dir=basis.budgets.spill_dir,
                timeline=timeline,
                recorder=recorder,
                undo=undo,
            )
            return cls(
                opened,
                policy=policy,
                basis=basis,
                tokenizer=tokenizer,
                assembly=assembly,
                fingerprint=_fingerprint(opened, pack, policy),
                recorder=recorder,
                closing=undo.pop_all(),
            )

    @property
    def block_rows(self) -> int:
        return self.policy.block_rows

    @property
    def num_rows(self) -> int:
        return self._block.num_rows

    @property
    def num_steps(self) -> int:
        """Grows while a sweep gets on. Another thread may ask, to tell a long one from one that stands
        still.
        """
        return self._executor.num_steps if self._executor else 0

    def adopt(self, policy: Policy) -> None:
        """Go on under a policy of other block rows, sweep tokens, micro-batch tokens, fetch tokens or
        reason; rows of the block stay. Raises BudgetError where it does not fit, or where anything
        else differs: that takes another engine.
        """
        if fixed := needs_reload(self.policy, policy):
            raise BudgetError(f"an engine that is loaded cannot change its {', '.join(fixed)}")
        check_budgets(self.basis.shape, policy, self.basis.budgets)
        self.policy = self._micro_batches.policy = policy
        self._block.max_rows = policy.block_rows
        self._recorder.policy_adopted(policy.reason)

    def check(self, prompt: Prompt) -> None:
        """Raises PromptError if the prompt cannot run, alone in an empty block."""
        self._admission.check(prompt)

    def submit(self, prompt: Prompt) -> None:
        """Let the prompt's rows wait for places in the block. Raises PromptError."""
        self.check(prompt)
        limit = len(prompt.token_ids) + prompt.sampling.max_tokens
        # The prompt is the same for all of them: it is read once.
        others = dataclasses.replace(prompt, reading=None)
        for index in range(prompt.sampling.n):
            matcher = self._admission.matcher(prompt)
            its = others if index else prompt
            self._block.add(Row(prompt=its, index=index, limit_tokens=limit, matcher=matcher))
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
        if self._executor is None:
            raise EngineError("the engine is closed: its rows go no further")
        with self._recorder.sweeping(shares):
            swept = self._executor.run(shares)
            completions = self._block.finish(
                shares,
                swept.tokens,
                swept.readings,
                is_end=self._endings.reason_to_end,
                complete=self._endings.complete,
            )
        self._recorder.swept(
            shares,
            num_generated=len(swept.tokens),
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
            self._weight_counters,
            self._product_counters,
            preempted_rows=self._block.num_preempted,
            shared_tokens=self._block.num_shared_tokens,
        )

    def close(self) -> None:
        """Of an engine that somebody still holds, weights, keys and values are gone with the next
        collection of cycles.
        """
        self._executor = None
        with contextlib.closing(self._recorder):
            self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _fingerprint(checkpoint: Checkpoint, pack: Pack, policy: Policy) -> str:
    """Of the weights, their dtypes as stored, and the dtype of the arithmetic."""
    dtypes = sorted({str(tensor.dtype) for group in pack.groups for tensor in group.tensors})
    facts = "\n".join([checkpoint.identity, policy.compute_dtype, *dtypes])
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset((*checkpoint.eos_token_ids, *tokenizer.eos_token_ids))
