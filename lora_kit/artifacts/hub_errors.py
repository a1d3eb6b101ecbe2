"""Describe errors of the Hub, without tokens and other secrets."""

import json

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # the base class in the HTTP library that huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from lora_kit.errors import scrub

TRANSIENT = {408, 409, 412, 425, 429}  # HTTP statuses, in addition to 5xx, after which a retry may succeed
FAILURES = (HTTPError, OSError, RuntimeError, ValueError, KeyError)  # errors that huggingface_hub raises


def reason_of(error: Exception, token: str | None) -> tuple[str, bool]:
    """Return a description of an error of huggingface_hub, and whether a retry may succeed.

    Args:
        error: One of FAILURES.
        token: The token in use, which is removed from the description.
    """
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # downloads and uploads of large files wrap the original error
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not used; unset it", False
    if isinstance(error, HfHubHTTPError):
        status, message = error.response.status_code, scrub(error.server_message or "", token)
        known = {
            401: "the Hub does not accept the token; log in with `hf auth login` or set HF_TOKEN",
            403: "the token has no write access to the repository; create a token with write access",
            404: "the repository or file does not exist on the Hub",
            409: "another commit to the repository is in progress",
            412: "the repository got another commit in the meantime",
            429: "too many requests; wait a few minutes",
        }
        reason = known.get(
            status, "the Hub reports an internal error" if status >= 500 else "the Hub refused the request"
        )
        return f"{reason} ({status}{': ' + message if message else ''})", status in TRANSIENT or status >= 500
    if isinstance(error, HTTPError):
        return f"the connection to the Hub failed ({type(error).__name__})", True
    return f"{type(error).__name__}: {scrub(str(error), token)}", isinstance(error, json.JSONDecodeError)
