"""The exceptions that lora_kit raises on purpose, as a small tree, so that a caller can catch a branch of it.

    LoraKitError
    ├── InputError           the user's input is wrong; nothing was changed      (exit code 2)
    │   ├── RecipeError      the recipe file or an override, or two fields that contradict each other
    │   ├── DataError        a record, a chat template, a dataset
    │   ├── BaseError        the base model or its tokenizer
    │   ├── LaunchError      the launcher's settings, a missing tracker, processes that compute differently
    │   ├── ContractError    resuming would change the recipe, the base or the data of the run
    │   └── LeaseError       another process is training in this run's folder
    ├── CheckpointError      a checkpoint is damaged, or cannot be written       (exit code 1)
    ├── PoisonError          several steps in a row had to be skipped            (exit code 1)
    ├── DivergenceError      the processes no longer hold the same adapter       (exit code 1)
    ├── HubError             a download from the Hub or an upload to it failed   (exit code 1)
    ├── RemoteError          checkpoints or data at a URL cannot be read or written (exit code 1)
    └── Stopped              a signal ended the run; the same command resumes it (exit code 75)

A message reads `where: what is wrong, what was found; what to do`. A message about several problems has a line for
each.
"""

import re

TOKEN = re.compile(r"hf_\w{20,}")  # of the Hub
ACCESS_KEY = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b")  # of S3


class LoraKitError(Exception):
    """Base of all errors that lora_kit raises on purpose."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows in a notebook: the message without a traceback."""
        mark = "stopped" if self.exit_code == 75 else "error"
        return f"{mark}: {self}".splitlines()


class InputError(LoraKitError):
    """The user's input is wrong. Nothing was changed."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe or an override is wrong."""


class DataError(InputError):
    """A record, a chat template or a dataset is wrong."""


class BaseError(InputError):
    """The base model or its tokenizer cannot be used with this recipe."""


class LaunchError(InputError):
    """The launcher's settings contradict the recipe, a tracker is missing, or the processes compute differently."""


class ContractError(InputError):
    """Resuming would change the recipe, the base or the data of the run."""


class LeaseError(InputError):
    """Another process is training in this run's folder."""


class CheckpointError(LoraKitError):
    """A checkpoint is damaged, or could not be written."""


class PoisonError(LoraKitError):
    """Several steps in a row had a loss or a gradient that is not finite or too large, and were skipped."""


class DivergenceError(LoraKitError):
    """The processes no longer hold the same adapter and optimizer state, although all compute the same update."""


class HubError(LoraKitError):
    """A download from the Hub or an upload to it failed. It left nothing half done, so the call can be repeated."""


class RemoteError(LoraKitError):
    """Checkpoints or data at a URL cannot be read or written. The call can be repeated."""


class Stopped(LoraKitError):
    """A signal ended the run after its last step became a checkpoint. The same command resumes it."""

    exit_code = 75


def scrub(text: str, token: str | None = None) -> str:
    """Return a text as a short line without tokens, passwords in URLs and query strings of URLs."""
    line = " ".join(text.split()).replace(token or "\0", "***")
    for pattern, replacement in (
        (TOKEN, "***"),
        (ACCESS_KEY, "***"),
        (r"://[^\s/@]+@", "://"),
        (r"(https?://[^\s?]+)\?\S+", r"\1"),
    ):
        line = re.sub(pattern, replacement, line)
    return line[:200]
