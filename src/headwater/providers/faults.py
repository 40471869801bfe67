"""What went wrong with the model's API, as a typed error with a sentence that says what to do. Pure.

Nothing here quotes a message, a key or a whole body: only the API's own error message, cut and
with everything that looks like a key removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

import orjson

from headwater.errors import ProviderError

#: Characters of the API's own message that are passed on.
MESSAGE_LENGTH: Final = 300
#: Codes of an error that may pass by itself.
PASSING: Final = frozenset({"provider_rate_limited", "provider_unavailable"})

_SECRET = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf)[-_][A-Za-z0-9*_\-]{6,}|\bAIza[A-Za-z0-9_\-]{10,}|\bbearer\s+\S{8,}", re.IGNORECASE
)
#: How servers say that they do not know or take a parameter.
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|n[o']t support|unknown|unrecogni[sz]ed|unexpected|extra|not permitted|not allowed"
    r"|invalid (?:argument|parameter)|instead"
)


@dataclass(frozen=True, slots=True)
class Complaint:
    """An API's error body, as far as it can be read."""

    message: str = ""
    code: str = ""
    param: str = ""
    #: An HTTP status inside the body, which gateways send in the middle of a stream.
    status: int | None = None
    #: The whole body in lower case, bounded, for looking up what it names.
    text: str = ""

    @classmethod
    def read(cls, body: bytes) -> Complaint:
        """From the body of an error response, which may be anything."""
        text = body[:20_000].decode("utf-8", "replace").lower()
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError:
            return cls(text=text)
        error = data.get("error", data) if isinstance(data, dict) else data
        return cls.of(error, text)

    @classmethod
    def of(cls, error: Any, text: str = "") -> Complaint:
        """From the value of an `error` member: an object or a sentence."""
        if isinstance(error, str):
            return cls(message=error, text=text or error.lower())
        if not isinstance(error, Mapping):
            return cls(text=text)
        message = error.get("message") or error.get("detail") or ""
        code, kind = error.get("code"), error.get("type")
        return cls(
            message=message if isinstance(message, str) else "",
            code=code if isinstance(code, str) else kind if isinstance(kind, str) else "",
            param=param if isinstance(param := error.get("param"), str) else "",
            status=code if isinstance(code, int) and 400 <= code <= 599 else None,
            text=text,
        )

    def refuses(self, parameter: str) -> bool:
        """Whether the API does not take this parameter at all, or not its value."""
        if self.param:
            named = self.param.split(".")[0] == parameter
        else:
            named = re.search(rf"\b{parameter}\b", self.text) is not None
        return named and (_UNSUPPORTED.search(self.text) is not None or parameter == "stream_options")


@dataclass(frozen=True, slots=True)
class Where:
    """What a sentence needs to name: the API's host, the model, and the key so that it can be removed."""

    host: str
    model: str
    key: str | None

    def clean(self, message: str) -> str:
        """The API's message, fit to be shown: no key, one line, bounded."""
        if self.key:
            message = message.replace(self.key, "[key]")
        message = " ".join(_SECRET.sub("[key]", message).split())
        return message if len(message) <= MESSAGE_LENGTH else message[: MESSAGE_LENGTH - 1] + "…"


def refused(status: int, headers: Mapping[str, str], complaint: Complaint, where: Where) -> ProviderError:
    """The error of an HTTP status other than 200."""
    if _out_of_credit(status, complaint):
        return ProviderError(
            f"The account behind this key has no credit left at {where.host}. Add credit there or use another key.",
            code="provider_rejected",
        )
    if status == HTTPStatus.NOT_FOUND or complaint.code == "model_not_found":
        return ProviderError(
            f"{where.host} knows no model “{where.model}”, or has no chat API at this address. "
            "Check OPENAI_MODEL and OPENAI_BASE_URL.",
            code="provider_model",
        )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return ProviderError(
            "The model's API refused the key. Check OPENAI_API_KEY."
            if where.key
            else "The model's API wants a key. Set OPENAI_API_KEY.",
            code="provider_auth",
        )
    wait = retry_after(headers)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        when = f"in {wait:.0f} s" if wait else "in a while"
        return ProviderError(
            f"The model's API is busy: too many requests. Try again {when}.",
            code="provider_rate_limited",
            retryable=True,
            retry_after=wait,
        )
    if status >= 500 or status == HTTPStatus.REQUEST_TIMEOUT:
        return ProviderError(
            f"The model's API has trouble (HTTP {status}). Try again in a while.",
            code="provider_unavailable",
            retryable=True,
            retry_after=wait,
        )
    if 300 <= status < 400:
        return ProviderError(
            f"{where.host} answered with a redirect (HTTP {status}), which is not followed. Check OPENAI_BASE_URL.",
            code="provider_rejected",
        )
    said = where.clean(complaint.message) or "it gave no reason."
    return ProviderError(f"The model's API refused the request (HTTP {status}): {said}", code="provider_rejected")


def mid_stream(complaint: Complaint, where: Where) -> ProviderError:
    """The error of an `error` object in the place of a chunk."""
    status = complaint.status or _STATUS_OF_CODE.get(complaint.code)
    if status is not None:
        return refused(status, {}, complaint, where)
    said = where.clean(complaint.message) or "it gave no reason."
    return ProviderError(f"The model's API broke off: {said} Try again.", code="provider_unavailable", retryable=True)


_STATUS_OF_CODE: Final = {
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "model_not_found": 404,
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "content_filter": 400,
}


def unreachable(where: Where, why: str) -> ProviderError:
    return ProviderError(
        f"{where.host} cannot be reached: {why}. Check the network and OPENAI_BASE_URL.",
        code="provider_unavailable",
        retryable=True,
    )


def untrusted(where: Where) -> ProviderError:
    return ProviderError(
        f"The certificate of {where.host} is not trusted. Check OPENAI_BASE_URL and the clock of this machine.",
        code="provider_unavailable",
    )


def connect_timeout(where: Where, seconds: float) -> ProviderError:
    return ProviderError(
        f"{where.host} did not take the connection within {seconds:g} s. Check the network and OPENAI_BASE_URL.",
        code="provider_timeout",
        retryable=True,
    )


def silent(seconds: float) -> ProviderError:
    return ProviderError(
        f"The model's API was silent for {seconds:g} s. Try again, or raise HEADWATER_PROVIDER_IDLE.",
        code="provider_timeout",
        retryable=True,
    )


def stuck(seconds: float) -> ProviderError:
    return ProviderError(
        f"The model's API kept the line open for {seconds:g} s without a word. Try again.",
        code="provider_timeout",
        retryable=True,
    )


def cut() -> ProviderError:
    return ProviderError(
        "The connection to the model's API ended in the middle of the answer. Try again.",
        code="provider_cut",
        retryable=True,
    )


def malformed(where: Where, why: str) -> ProviderError:
    return ProviderError(
        f"{where.host} sent something that is not a chat completion: {why}. Check OPENAI_BASE_URL.",
        code="provider_malformed",
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the API asks to wait, from `retry-after-ms` or `Retry-After`; None when it does not say.

    A date is read against the response's own `Date`, so that the two clocks need not agree.
    """
    try:
        if "retry-after-ms" in headers:
            return _seconds(float(headers["retry-after-ms"]) / 1000)
        value = headers.get("Retry-After", "").strip()
        if not value:
            return None
        if value[0].isdigit():
            return _seconds(float(value))
        return _seconds((_date(value) - _date(headers["Date"])).total_seconds())
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _seconds(value: float) -> float | None:
    return value if 0 <= value < 1e7 else None


def _date(value: str) -> datetime:
    return parsedate_to_datetime(value)


def _out_of_credit(status: int, complaint: Complaint) -> bool:
    broke = complaint.code == "insufficient_quota" or "insufficient_quota" in complaint.text
    return status == HTTPStatus.PAYMENT_REQUIRED or (broke and status in (429, 403))
