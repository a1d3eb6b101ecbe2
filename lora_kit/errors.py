"""What can go wrong, as one small tree, so that a caller can catch exactly what it can mend.

    LoraKitError
    ├── InputError           the user gave something that cannot work        (exit code 2)
    │   ├── RecipeError      the recipe file, an override, or two that contradict
    │   ├── DataError        a record, a template, a dataset
    │   ├── BaseError        the base or its tokenizer does not fit
    │   ├── LaunchError      the launcher's settings contradict the recipe
    │   ├── ContractError    a resume would change what the run is
    │   └── LeaseError       another job writes to this run
    ├── CheckpointError      a checkpoint does not verify, or cannot be written (exit code 1)
    ├── PoisonError          step after step cannot be taken                   (exit code 1)
    ├── DivergenceError      the processes' states are not the same any more   (exit code 1)
    ├── HubError             the Hub refused, or could not be reached          (exit code 1)
    └── Stopped              a signal ended the run; the same command goes on  (exit code 75)

A message reads `where: what is wrong, what was found; what to do`. One that reports several problems puts each on a
line of its own.
"""


class LoraKitError(Exception):
    """Base of all errors that lora_kit raises on purpose."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Return the lines that a notebook shows: the message alone, as on the command line. IPython asks for them."""
        mark = "stopped" if self.exit_code == 75 else "error"
        return f"{mark}: {self}".splitlines()


class InputError(LoraKitError):
    """What the user gave cannot work; nothing was lost."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or an override of it, is wrong."""


class DataError(InputError):
    """A record, a chat template or a dataset is wrong."""


class BaseError(InputError):
    """The base model or its tokenizer cannot be used as asked."""


class LaunchError(InputError):
    """The launcher's settings contradict the recipe."""


class ContractError(InputError):
    """Resuming as asked would change what the run is."""


class LeaseError(InputError):
    """Another job is writing to this run's folder."""


class CheckpointError(LoraKitError):
    """A checkpoint does not verify, or could not be committed."""


class PoisonError(LoraKitError):
    """Step after step had a loss or a gradient that is no number; the adapter is as it was before them."""


class DivergenceError(LoraKitError):
    """The processes, which compute the same, do not have the same state any more."""


class HubError(LoraKitError):
    """The Hub refused, or could not be reached; the same call can be made again."""


class Stopped(LoraKitError):
    """A signal ended the run after a durable checkpoint; the same command goes on."""

    exit_code = 75
