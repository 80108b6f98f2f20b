"""Which errors say that a disk, a network or an object store failed, rather than that something is wrong with what was
asked of it: the same request may succeed later."""

import errno
from typing import Any, Final

FAULTS: Final = frozenset(
    {errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNRESET}
    | {errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
)
"""Error numbers of disks and networks that fail."""

_CONFLICTS: Final = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
_CODES: Final = _CONFLICTS | frozenset(
    {"SlowDown", "InternalError", "ServiceUnavailable", "ServerBusy", "OperationTimedOut", "RequestTimeout", "Busy"}
    | {"Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
    | {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
)
_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509})
# Clients are not imported for this: each is an optional package.
_KINDS: Final = frozenset(
    {"HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}
    | {"ClientConnectionError", "ServerDisconnectedError", "ClientPayloadError", "IncompleteReadError"}
    | {"CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
)


def error_code(error: BaseException | None) -> str:
    """The store's own error code behind what its client raised; "" if there is none."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
        if code:
            return str(code)
    return ""


def is_conflict(error: BaseException) -> bool:
    """Whether another request for the same name is under way (409)."""
    return error_code(error) in _CONFLICTS or _status(error) == 409


def is_fault(error: BaseException) -> bool:
    """Whether the disk, network or store failed, or a token ran out."""
    if error_code(error) in _CODES or _status(error) in _STATUSES:
        return True
    for each in _chain(error):
        if isinstance(each, TimeoutError | ConnectionError) or (isinstance(each, OSError) and each.errno in FAULTS):
            return True
        if any(kind.__name__ in _KINDS for kind in type(each).__mro__):
            return True
    return False


def _status(error: BaseException) -> int:
    """The HTTP status behind an error; 0 if there is none."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        found: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        for value in (found, getattr(each, "status", None), getattr(each, "status_code", None)):
            if isinstance(value, int) and value:
                return value
    return 0


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what caused it."""
    found: list[BaseException] = []
    while error is not None and error not in found and len(found) < 8:
        found.append(error)
        error = error.__cause__
    return found
