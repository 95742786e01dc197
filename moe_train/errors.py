"""Every error a user can cause, drawn as a tree.

MoeTrainError
 ├─ ConfigError        a recipe that cannot be run: dotted key (value), the rule, what to do
 │   └─ TopologyError  sizes that do not fit the number of ranks
 ├─ RoutingError       a router whose output or options the layer cannot use
 ├─ DataError          a corpus, an index or a tokenizer that cannot be read
 ├─ CheckpointError    a checkpoint that is damaged, missing or of another run
 └─ TrainingError      a run that had to stop: a loss or gradient that is not finite

The command line prints the message alone (no traceback) and exits with `exit_code`.
"""


class MoeTrainError(Exception):
    """Base class; `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(MoeTrainError):
    """A recipe that cannot be run."""

    exit_code = 2


class TopologyError(ConfigError):
    """Parallel sizes that do not fit each other or the number of ranks."""


class RoutingError(MoeTrainError):
    """A router whose output or options the layer cannot use."""

    exit_code = 3


class DataError(MoeTrainError):
    """A corpus, an index or a tokenizer that cannot be read."""

    exit_code = 4


class CheckpointError(MoeTrainError):
    """A checkpoint that is damaged, missing or belongs to another run."""

    exit_code = 5


class TrainingError(MoeTrainError):
    """Training stopped because going on would harm the weights."""

    exit_code = 6
