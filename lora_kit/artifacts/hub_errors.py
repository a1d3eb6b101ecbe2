"""What the Hub's refusals and failures mean, in words without secrets."""

import json
import re

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of whichever HTTP library huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

PASSING = {408, 409, 412, 425, 429}  # statuses, beside 5xx, that the same push may not meet again
TOKEN = re.compile(r"hf_\w{20,}")
FAILURES = (HTTPError, OSError, RuntimeError, ValueError, KeyError)  # what huggingface_hub raises


def reason_of(error: Exception, token: str | None) -> tuple[str, bool]:
    """Return what went wrong, in words without secrets, and whether it may pass by itself."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the upload of a large file, and a download, hide what went wrong
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off here by HF_HUB_OFFLINE", False
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, scrub(error.server_message or "", token)
        known = {
            401: "the Hub does not accept the token; log in with `hf auth login` or set HF_TOKEN",
            403: "the token may not write there; make one with write access",
            404: "the Hub has no such thing",
            409: "another commit is being made there",
            412: "another commit came in between",
            429: "too many requests; wait some minutes",
        }
        reason = known.get(status, "the Hub has a fault" if status >= 500 else "the Hub refused")
        return f"{reason} ({status}{': ' + said if said else ''})", status in PASSING or status >= 500
    if isinstance(error, HTTPError):
        return f"the connection to the Hub failed ({type(error).__name__})", True
    return f"{type(error).__name__}: {scrub(str(error), token)}", isinstance(error, json.JSONDecodeError)


def scrub(text: str, token: str | None) -> str:
    """Return one short line without tokens, passwords in addresses, or signatures of addresses."""
    line = " ".join(text.split()).replace(token or "\0", "***")
    for pattern, harmless in ((TOKEN, "***"), (r"://[^\s/@]+@", "://"), (r"(https?://[^\s?]+)\?\S+", r"\1")):
        line = re.sub(pattern, harmless, line)
    return line[:200]
