"""What is decided with: this machine as measured and corrected, a person's wishes, a policy's file."""

import dataclasses
import logging
from pathlib import Path
from typing import Final, Self

from engine.config import Budgets
from engine.errors import BudgetError, HardwareError, RecordError
from engine.planning.corrections import Corrections
from engine.planning.cost import with_spare_kv
from engine.planning.flops import Work
from engine.planning.hardware import Hardware
from engine.planning.planners import PLANNERS
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy
from engine.planning.predict import predict
from engine.planning.prediction import Prediction
from engine.planning.records import read_record, write_record
from engine.planning.roofline import Model
from engine.planning.shape import ModelShape
from engine.planning.workload import Workload
from engine.profiling.saved import measured_or_saved, read_hardware
from engine.sweep.outcome import Outcome
from jobs.settings import Settings
from worker.queue_shape import QueueShape
from worker.workload import workload_of

_LEAST_CONTEXT_TOKENS: Final = 256

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A policy and what it is predicted to achieve; None where the planner promises nothing."""

    policy: Policy
    prediction: Prediction | None = None


class Planning:
    """Decides, and learns from outcomes. `obeyed` is a policy that is carried out as it is."""

    def __init__(
        self,
        hardware: Hardware,
        *,
        wishes: Wishes,
        corrections_file: Path,
        obeyed: Policy | None = None,
    ) -> None:
        self._hardware = hardware
        self._wishes = wishes
        self._obeyed = obeyed
        self._corrections_file = corrections_file
        self.corrections = read_corrections(corrections_file, hardware)

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Measures this machine quickly if nobody has. Raises EngineError."""
        return cls(
            known_hardware(settings),
            wishes=Wishes(block_rows=settings.block_rows, sweep_tokens=settings.sweep_tokens),
            corrections_file=settings.corrections_file,
            obeyed=read_record(Policy, settings.policy) if settings.policy else None,
        )

    @property
    def hardware(self) -> Hardware:
        """As runs have found it."""
        return self.corrections.applied_to(self._hardware)

    def decide(
        self, shape: ModelShape, work: Work, budgets: Budgets, queue: QueueShape
    ) -> Decision:
        """Where the longest rows that are allowed do not fit, for rows half as long, and so on.

        Raises BudgetError where not even short ones do.
        """
        policy, longest_tokens = self._obeyed, shape.max_context_tokens
        while policy is None:
            workload = workload_of(queue, longest_tokens=longest_tokens)
            try:
                policy = self._plan(shape, work, budgets, workload)
            except BudgetError as error:
                if longest_tokens <= _LEAST_CONTEXT_TOKENS:
                    raise
                longest_tokens = max(_LEAST_CONTEXT_TOKENS, longest_tokens // 2)
                _log.info("planned for rows of %d tokens at most: %s", longest_tokens, error)
        return Decision(policy=policy, prediction=self.predict(shape, work, policy, queue))

    def predict(
        self, shape: ModelShape, work: Work, policy: Policy, queue: QueueShape
    ) -> Prediction | None:
        """None where the machine's description lacks a rate that the policy needs."""
        model = Model(shape=shape, work=work, hardware=self.hardware)
        workload = workload_of(queue, longest_tokens=shape.max_context_tokens)
        try:
            return predict(model, policy, workload)
        except HardwareError as error:
            _log.warning("nothing is predicted: %s", error)
            return None

    def _plan(self, shape: ModelShape, work: Work, budgets: Budgets, workload: Workload) -> Policy:
        situation = Situation(hardware=self.hardware, work=work, workload=workload)
        wishes = dataclasses.replace(self._wishes, situation=situation)
        try:
            return with_spare_kv(shape, PLANNERS["milp"](shape, budgets, wishes), budgets)
        except HardwareError as error:
            _log.warning("planned by fixed rules: %s", error)
            return PLANNERS["fixed"](shape, budgets, wishes)

    def learn(self, outcome: Outcome) -> None:
        """From a steady run; kept for the next start. A file that cannot be written is logged."""
        if not outcome.is_steady:
            return
        self.corrections = self.corrections.learned(outcome.predicted_s, outcome.measured_s)
        try:
            write_record(self._corrections_file, self.corrections)
        except RecordError as error:
            _log.warning("corrections are not kept: %s", error)


def known_hardware(settings: Settings) -> Hardware:
    """Of the file that the settings name, or of this machine. Raises EngineError."""
    if settings.profile is not None:
        return read_hardware(settings.profile)
    return measured_or_saved(settings.profile_file, spill_dir=settings.weights_dir, is_quick=True)


def read_corrections(path: Path, hardware: Hardware) -> Corrections:
    """Those of that very measurement; of another one, or of none that can be read, there are none."""
    none = Corrections(measured_on=hardware.measured_on)
    if not path.exists():
        return none
    try:
        found = read_record(Corrections, path)
    except RecordError as error:
        _log.warning("corrections are begun anew: %s", error)
        return none
    return found if found.measured_on == hardware.measured_on else none
