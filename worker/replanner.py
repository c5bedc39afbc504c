"""Holds a loaded engine to the plan of the queue as it is: what can change at work does, for the rest
it says when a new load is worth its time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import structlog

from engine.engine import Engine
from engine.errors import BudgetError
from engine.planning.cost import check_budgets
from engine.planning.policy import Policy, Tier, needs_reload
from engine.planning.prediction import Prediction
from engine.sweep.outcome import outcome_of
from engine.sweep.report import Report
from jobs.line_group import WaitingBatch
from worker.planning import Decision, Planning
from worker.queue_shape import QueueShape

log: Final = structlog.get_logger(__name__)
_WORTH: Final = 3.0
"""Times the seconds of a load that it must be predicted to save."""


class Replanner:
    """`load_s` is how long loading took; `decision` and `queue` are what the engine was loaded for."""

    def __init__(
        self,
        engine: Engine,
        planning: Planning,
        *,
        decision: Decision,
        queue: QueueShape,
        load_s: float,
    ) -> None:
        self._engine = engine
        self._planning = planning
        self._decision = decision
        self._queue = queue
        self._load_s = load_s

    @property
    def predicted_tokens_per_s(self) -> float | None:
        """Of the plan as it stands; None for one that was not predicted."""
        prediction = self._decision.prediction
        return None if prediction is None else prediction.tokens_per_s

    def consider(self, waiting: Sequence[WaitingBatch]) -> bool:
        """Plan again if the queue has moved; whether the engine had better be loaded anew."""
        queue = QueueShape.of(waiting)
        if not queue.has_moved_from(self._queue, block_rows=self._engine.block_rows):
            return False
        self._queue = queue
        try:
            wanted = self._decide(queue)
        except BudgetError as error:
            log.warning("the loaded policy stays", error=str(error))
            return False
        held = self._held(wanted)
        if needs_reload(self._engine.policy, wanted.policy) and self._is_worth_a_load(
            wanted, held, queue
        ):
            log.info("another policy is worth a load", **told(wanted))
            return True
        self._engine.adopt(held.policy)
        self._decision = held
        log.info("policy for the queue as it is", **told(held))
        return False

    def settle(self, report: Report) -> dict[str, Any] | None:
        """Of a busy period: predicted beside measured, by term, and what it taught."""
        prediction = self._decision.prediction
        if prediction is None:
            return None
        outcome = outcome_of(prediction, self._engine.policy, report)
        if outcome is None:
            return None
        self._planning.learn(outcome)
        terms = self._planning.corrections.terms
        corrections = {name: round(each.factor, 4) for name, each in terms.items()}
        return {**outcome.as_dict(), "corrections": corrections}

    def _decide(self, queue: QueueShape) -> Decision:
        basis = self._engine.basis
        return self._planning.decide(basis.shape, basis.work, basis.budgets, queue)

    def _held(self, wanted: Decision) -> Decision:
        """The better of what is loaded and of the same with the block that is wanted."""
        loaded = self._engine.policy
        stays = Decision(policy=loaded, prediction=self._predict(loaded))
        policy = _moved(loaded, wanted.policy)
        try:
            check_budgets(self._engine.basis.shape, policy, self._engine.basis.budgets)
        except BudgetError as error:
            log.info("the loaded block stays", error=str(error))
            return stays
        moved = Decision(policy=policy, prediction=self._predict(policy))
        if stays.prediction is None or moved.prediction is None:
            return moved
        is_better = moved.prediction.tokens_per_s >= stays.prediction.tokens_per_s
        return moved if is_better else stays

    def _predict(self, policy: Policy) -> Prediction | None:
        basis = self._engine.basis
        return self._planning.predict(basis.shape, basis.work, policy, self._queue)

    def _is_worth_a_load(self, wanted: Decision, held: Decision, queue: QueueShape) -> bool:
        """Whether the rest of the queue would end so much sooner, or rows would be refused that need
        not be.
        """
        is_too_long = queue.longest_tokens > self._engine.max_context_tokens
        if is_too_long and _holds_longer(wanted.policy, held.policy):
            return True
        now, then = held.prediction, wanted.prediction
        if now is None or then is None:
            return False
        tokens = queue.num_rows * queue.mean("output_tokens")
        saved_s = tokens / now.tokens_per_s - tokens / then.tokens_per_s
        return saved_s > _WORTH * self._load_s


def _holds_longer(wanted: Policy, loaded: Policy) -> bool:
    """Whether its largest home of keys and values is larger."""
    return max(wanted.kv[tier] for tier in Tier) > max(loaded.kv[tier] for tier in Tier)


def _moved(loaded: Policy, wanted: Policy) -> Policy:
    """The loaded placement with the block that is wanted."""
    return dataclasses.replace(
        loaded,
        block_rows=wanted.block_rows,
        sweep_tokens=wanted.sweep_tokens,
        micro_batch_tokens=wanted.micro_batch_tokens,
        fetch_tokens=wanted.fetch_tokens,
        reason=f"another block for the weights as they lie; a new load would have: {wanted.reason}"
        if needs_reload(loaded, wanted)
        else wanted.reason,
    )


def told(decision: Decision) -> dict[str, Any]:
    """What a log says of it."""
    policy, prediction = decision.policy, decision.prediction
    said: dict[str, Any] = {
        "reason": policy.reason,
        "compute": str(policy.compute),
        "compute_dtype": policy.compute_dtype,
        "block_rows": policy.block_rows,
        "sweep_tokens": policy.sweep_tokens,
        "kv_bytes": policy.kv.total_bytes,
        "streamed_bytes": policy.streamed_bytes,
    }
    if prediction is not None:
        said |= {
            "tokens_per_s": round(prediction.tokens_per_s, 1),
            "sweep_s": round(prediction.sweep_s, 4),
            "binding": prediction.binding_term,
        }
    return said
