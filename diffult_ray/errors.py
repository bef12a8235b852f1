"""The two ways in which a request can be refused, each with the exit code that the front door returns."""

import re

# Of a URI, up to its port or path: ://user, and what follows to the last @.
PASSWORD = re.compile(r"(://[^\s:/@]*):(?!\d{1,5}(?:[/?#]|$))\S*@")
# Google Cloud's status, of which the last message tells why, and at its end the cause below.
STATUS = re.compile(
    r"google::cloud::Status\(.*?last message of (?:.*?underlying error message was: )?(.*?) error_info="
)
UNTOLD = object()  # no value to tell; None is one, YAML's null


class Refused(Exception):
    """A request that cannot be carried out, told in one line.

    Args:
        where: the place that the user can change: a file and a dotted key, an option, a variable.
        rule: what holds there.
        value: what was received.
        advice: what to do.
    """

    exit_code = 2

    def __init__(self, *, where: str, rule: str, value: object = UNTOLD, advice: str = "") -> None:
        received = "" if value is UNTOLD else f" (got {_short(value)})"
        advised = f"; {advice}" if advice else ""
        super().__init__(" ".join(f"{where}: {rule}{received}{advised}".split()))


class BadInput(Refused):
    """A mistake in a file, an option or an environment variable: exit code 2."""


class DoesNotFit(Refused):
    """A request that the cluster can never hold: exit code 3."""

    exit_code = 3


def _short(value: object, limit: int = 200) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def masked(text: str) -> str:
    """A text, such as a URI or a message that holds one, without the passwords in it."""
    text = PASSWORD.sub(r"\1:***@", text)
    return re.sub(r"(?i)(\w*(?:password|token|secret)\w*)=[^&\s]+", r"\1=***", text)


def said(error: BaseException) -> str:
    """What a file system says, in one line.

    >>> said(OSError("google::cloud::Status(UNKNOWN: with a last message of no such file error_info={...}"))
    'no such file'
    """
    text = " ".join(str(error).split())
    status = STATUS.search(text)
    return status[1] if status else text
