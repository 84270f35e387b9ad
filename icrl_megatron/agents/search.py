"""Search as a tool: any function that returns passages for a query."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from icrl_megatron.agents.tools import Arguments, ToolFailure, ToolSpec
from icrl_megatron.utils.errors import EnvironmentFailure

NOTHING = "Nothing was found."


class Search:
    """Answers `query` with numbered passages, each cut to `passage_chars`."""

    spec = ToolSpec.of_text("search", "Searches a collection of documents.", "query")

    def __init__(
        self,
        find: Callable[[str, int], Awaitable[list[str]]],
        passages: int,
        passage_chars: int = 2000,
        version: str = "",
    ) -> None:
        """`find(query, count)` returns at most `count` passages, best first, and may raise EnvironmentFailure.
        `version` names the collection and its state, for the cache of answers; empty: they are not cached.

        `LocalRetriever` and `RemoteRetriever` (tasks/retrieval.py) have such a method: `search`.
        """
        if version:
            self.spec = replace(self.spec, version=f"{version}, {passages} passages of {passage_chars} characters")
        self._find, self._passages, self._passage_chars = find, passages, passage_chars

    async def call(self, arguments: Arguments) -> str:
        query = arguments["query"].strip()
        try:
            found = await self._find(query, self._passages) if query else []
        except EnvironmentFailure as error:
            raise ToolFailure(str(error)) from error
        shown = (f"({i}) {passage[: self._passage_chars]}" for i, passage in enumerate(found, start=1))
        return "\n\n".join(shown) or NOTHING
