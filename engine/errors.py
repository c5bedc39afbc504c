"""Every refusal of the engine, as a tree.

EngineError
├── CheckpointError        the files cannot be read: missing, truncated, damaged
├── UnsupportedModelError  the architecture is named, and why it cannot be honoured
├── ComputeDtypeError      the model cannot be computed in that dtype here, and why
├── BudgetError            a tier lacks bytes: which tier, how many, how many are there
├── HardwareError          a machine's description lacks a figure or has one that cannot be
├── WorkloadError          no rows are like those described
├── PromptError            one prompt cannot run (the row fails, the block goes on)
├── PackError              a packed weight file does not hold what its manifest says
├── RecordError            a policy's or a profile's JSON file does not hold one: which field
├── TokenizerError         text was given, and the checkpoint has no tokenizer for it
├── ChatTemplateError      there is no chat template, or it refuses the messages
└── GrammarError           a grammar cannot be honoured, and why
"""


class EngineError(Exception):
    """Base of the tree; its message is fit to be shown to the person who started the engine."""


class CheckpointError(EngineError):
    """The checkpoint cannot be read."""


class UnsupportedModelError(EngineError):
    """The architecture's semantics cannot be honoured."""


class ComputeDtypeError(EngineError):
    """The dtype asked for is unknown, or of no use on this device."""


class BudgetError(EngineError):
    """A tier's byte budget is too small for the policy."""


class HardwareError(EngineError):
    """A machine's description cannot be read, or lacks what is asked of it."""


class WorkloadError(EngineError):
    """A described workload has no rows, or rows that cannot be."""


class PromptError(EngineError):
    """One prompt is refused; `code` and `param` follow the wire contract's names."""

    def __init__(self, message: str, *, code: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class PackError(EngineError):
    """A packed weight file is damaged."""


class RecordError(EngineError):
    """A file of the planner's values cannot be read, or holds something else."""


class TokenizerError(EngineError):
    """Text cannot become token ids."""


class ChatTemplateError(EngineError):
    """Messages cannot become a prompt."""


class GrammarError(EngineError):
    """A grammar cannot be honoured."""
