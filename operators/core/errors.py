"""What can go wrong, as a tree.

OperatorError
├── ConceptError            the concept has no tokens, or too many
├── ConceptFileError        a file of concepts has mistakes
├── ModelError              the model cannot be found or loaded
│   └── UnsupportedModelError   its architecture has no detach table
├── BuildError              a build that cannot be made (layer out of range, too little memory, ...)
│   └── ReconstructionError     sum J x does not give back the hidden state
├── AnalysisError           an analysis that cannot be made, read or written
├── StoreError              a name that is not allowed, is missing, or is taken
│   ├── NameTakenError          the store has an operator of that name, which may not be replaced
│   └── OtherVersionError       it has another version under that name than the one to replace
├── ArtifactError           a file is not a whole, valid operator
│   └── IncompatibleOperatorError   it is valid, and belongs to another model
├── VectorError             a vector, or a file of vectors or texts, that cannot be used or written
├── TrialError              a calibration with invalid bounds, or a prompt that cannot be continued
└── SteeringError           a direction that cannot be formed
    └── SettingError            a strength, rule, blend or range of positions that is not accepted

Every message names the thing, the value that was found and what is accepted.
"""


class OperatorError(Exception):
    """Base of every error raised by this package."""


class ConceptError(OperatorError):
    """The concept cannot be used: no tokens, or more than the model's context."""


class ConceptFileError(OperatorError):
    """A file of concepts cannot be used; each of ``problems`` names file, line and key."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ModelError(OperatorError):
    """The model cannot be found or loaded."""


class UnsupportedModelError(ModelError):
    """The model has a module that no detach table knows."""


class BuildError(OperatorError):
    """The requested operator cannot be built."""


class ReconstructionError(BuildError):
    """The detached map does not reproduce the model: the operator would be wrong."""


class AnalysisError(OperatorError):
    """An analysis that cannot be made, or whose files cannot be read or written."""


class StoreError(OperatorError):
    """A name in the store is not allowed, missing, or taken."""


class NameTakenError(StoreError):
    """The store has an operator of that name, and nothing says that it may be replaced."""


class OtherVersionError(StoreError):
    """The store has another version than the one that may be replaced; ``found`` is its digest."""

    def __init__(self, message: str, *, found: str) -> None:
        super().__init__(message)
        self.found = found


class ArtifactError(OperatorError):
    """A file is not a whole, valid operator artifact."""


class IncompatibleOperatorError(ArtifactError):
    """A valid operator that belongs to another model, tokenizer, layer or shape."""


class VectorError(OperatorError):
    """A vector, or a file of vectors or texts, that cannot be read, used or written."""


class TrialError(OperatorError):
    """The calibration has invalid bounds or options, or a prompt cannot be continued."""


class SteeringError(OperatorError):
    """The steering direction cannot be formed (zero or not finite)."""


class SettingError(SteeringError):
    """A strength, rule, blend or range of positions is not accepted; ``field`` says which."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem
