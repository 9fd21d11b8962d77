"""Why a run failed, as its log and its report say it."""

from hmpo.errors import HmpoError
from hmpo.telemetry.records import without_addresses
from hmpo.telemetry.secrets import mask_credentials

REASON = 500
"""Characters of a failure that the log keeps."""


def failure_text(error: BaseException) -> str:
    """Why a run failed, in one line without secrets and addresses, whatever the exception does."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "its text cannot be made"
    kind = type(error).__name__
    text = said if isinstance(error, HmpoError) and said else f"{kind}: {said}" if said else kind
    text = without_addresses(mask_credentials(text))
    return text if len(text) <= REASON else text[: REASON - 3] + "..."
