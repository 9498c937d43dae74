"""What the Hub answers when it does not do what is asked: one clear error each, and which are worth another try."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from zoo.errors import HubError

# huggingface_hub is imported in functions only: it reads its environment (offline, endpoint, xet) when it is imported.
_WAITS = (0.5, 1, 2, 4, 8)  # seconds between tries
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
Result = TypeVar("Result")


@contextmanager
def asking(what: object, *, perhaps_local: bool = False) -> Iterator[None]:
    """Within it, whatever a client of the Hub raises becomes a HubError that begins with ``what``.

    Args:
        what: the model, as the user wrote it.
        perhaps_local: whether a directory may have been meant, so that the error says that there is none.

    Raises:
        HubError: the model or revision is not there, access is not granted, or the Hub cannot be reached.
    """
    from huggingface_hub import errors as hub

    try:
        yield
    except (
        *(hub.HfHubHTTPError, hub.HFValidationError, hub.SafetensorsParsingError, hub.OfflineModeIsEnabled),
        *(OSError, _http().HTTPError),
    ) as error:
        raise HubError(f"{what}: {_reason(error, 'no such directory, and ' if perhaps_local else '')}") from error


def require_token(what: object, token: str | None) -> None:
    """Raise HubError unless there is a token, given or of the user's own, to write with."""
    from huggingface_hub import get_token

    if token is None and get_token() is None:
        raise HubError(f"{what}: pushing needs a token that may write; {_LOGIN}")


def retried(work: Callable[[], Result]) -> Result:
    """What ``work`` returns, which is tried again where the Hub or the line to it fails for a moment.

    A connection that is refused is no such moment: there is no Hub.
    """
    for wait in _WAITS:
        try:
            return work()
        except Exception as error:
            if not _transient(error):
                raise
            time.sleep(wait)
    return work()


def _http() -> Any:
    """The library that huggingface_hub speaks HTTP with, whose errors it lets through: httpx, or httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _transient(error: Exception) -> bool:
    lost = isinstance(error, _http().TransportError) and not isinstance(error, _http().ConnectError)
    return lost or _status(error) in _TRANSIENT


def _reason(error: Exception, no_directory: str) -> str:
    """Why, and what to do; ``no_directory`` goes before whatever a misspelt path could be the cause of."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):  # a subclass of RepositoryNotFoundError: must come first
        return f"gated; accept its terms on its page, and {_LOGIN}"
    if isinstance(error, hub.RepositoryNotFoundError):
        access = "your token cannot see it" if get_token() else _LOGIN
        return f"{no_directory}no such model on the Hub; check the spelling, or if it is private: {access}"
    if isinstance(error, hub.RevisionNotFoundError):
        return "the model has no such branch, tag or commit; see its page for what there is"
    if isinstance(error, hub.HFValidationError):
        return f"{no_directory}not a Hub id: {_line(error)}"
    if isinstance(error, hub.SafetensorsParsingError):
        return f"a file of weights is damaged on the Hub: {_line(error)}"
    if "xet" in str(error).lower() and constants.ENDPOINT != "https://huggingface.co":
        return f"{constants.ENDPOINT} has no Xet storage; use --no-xet, or set HF_HUB_DISABLE_XET=1"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"its files cannot be kept here: {_line(error)}"
    status = _status(error)
    if status == 401:
        return f"the Hub wants a token that is valid: {_LOGIN}"
    if status == 403:
        return "your token may not do this; it needs a role that writes, and you must be a member of the organisation"
    if status == 412:
        return "somebody else changed it meanwhile; look at the change, then run this again"
    if status is not None:
        said = getattr(error, "server_message", None) or "without a reason"
        return f"the Hub answers {status} ({said}); try again later"
    if constants.HF_HUB_OFFLINE:
        return f"{no_directory}the Hub is not asked offline; unset HF_HUB_OFFLINE, or check the spelling of the path"
    return (
        f"{no_directory}the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}); "
        "check the spelling of the path, or the network"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
