"""Addresses of servers, and texts about them, without keys and passwords: for messages, logs and reports."""

from __future__ import annotations

from yarl import URL

from icrl_megatron.utils.errors import ConfigError

HIDDEN = "***"
LEAST_CHARS = 8
"""Shorter values are no keys, and would be hidden in words."""


def check_base(url: str, setting: str) -> None:
    """Raises ConfigError unless `url` is an address that paths can be added to, without a user name or password."""
    try:
        found = URL(url)
        whole = found.scheme in ("http", "https") and bool(found.host)
    except ValueError:  # such as a port that is no number
        whole = False
    if not whole:
        raise ConfigError(f"{setting}={shown(url)!r}: not an address; write e.g. http://host:8000/v1")
    if found.user is not None or found.password is not None:
        raise ConfigError(
            f"{setting}={shown(url)}: has a user name or password; leave it out, and put the key into the environment "
            "variable that api_key_env names"
        )
    if found.raw_query_string or found.raw_fragment:
        raise ConfigError(
            f"{setting}={shown(url)}: has a query (?) or fragment (#), to which no path fits; leave it out"
        )


def shown(url: str) -> str:
    """An address for messages: without user name, password, query and fragment."""
    scheme, between, rest = url.partition("://") if "://" in url else ("", "", url)
    # A password may contain any character, so the last @ ends it.
    return f"{scheme}{between}{rest.rpartition('@')[2].partition('?')[0].partition('#')[0]}"


def secrets(url: str) -> tuple[str, ...]:
    """The parts of an address that may be keys."""
    try:
        found = URL(url)
    except ValueError:
        return ()
    return tuple(filter(None, (found.password, *found.query.values())))


def hidden(text: str, *values: str) -> str:
    """A text for messages, in which `values` are hidden."""
    for value in sorted((value for value in values if len(value) >= LEAST_CHARS), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text
