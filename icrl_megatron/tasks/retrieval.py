"""Retrievers: BM25 over a local JSONL of documents, or a retriever behind HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import EnvironmentFailure, sendable
from icrl_megatron.tasks.servers import Pool
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import locked

META = "source.json"
OFFSETS = "offsets.npy"
BUILD_S = 4 * 3600.0
"""Processes of one corpus wait this long for the one that builds its index."""


class LocalRetriever:
    """BM25 by bm25s. The index is built once beside the corpus and memory-mapped afterwards.

    A document is {"contents"} (its title on the first line) or {"title", "text"}. Raises ConfigError if the corpus is
    missing, empty or damaged, or the index cannot be written.
    """

    def __init__(self, corpus: Path) -> None:
        if not corpus.is_file():
            raise ConfigError(f"data.corpus={corpus}: no such file; give a JSONL of documents")
        self._corpus = corpus
        folder = corpus.with_name(corpus.name + ".bm25s")
        stat = corpus.stat()
        source = {"size": stat.st_size, "changed": stat.st_mtime_ns}
        if _meta(folder) != source:
            with locked(corpus.parent, f".{corpus.name}.bm25s.lock", f"the index of {corpus}", BUILD_S):
                _build(corpus, folder, source)
        import bm25s

        self._index = bm25s.BM25.load(str(folder), mmap=True)
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets)

    async def search(self, query: str, count: int) -> list[str]:
        return [text for text, _ in await asyncio.to_thread(self.scored, query, count)]

    def scored(self, query: str, count: int) -> list[tuple[str, float]]:
        """As `search`, each passage with its BM25 score. Blocks."""
        tokens = _words([query])
        found, scores = self._index.retrieve(tokens, k=min(count, len(self)), show_progress=False, n_threads=0)
        with self._corpus.open("rb") as lines:
            return [
                (_text(_at(lines, int(self._offsets[i]))), float(score))
                for i, score in zip(found[0], scores[0], strict=True)
                if score > 0
            ]


class RemoteRetriever:
    """Servers with the API of Search-R1's retriever: POST /retrieve {"queries", "topk", "return_scores"}."""

    def __init__(
        self, urls: Sequence[str], timeout_s: float, answer_bytes: int = RolloutSettings.max_observation_bytes
    ) -> None:
        self._pool = Pool(urls, timeout_s, answer_bytes)

    async def search(self, query: str, count: int) -> list[str]:
        server = self._pool.choose()
        server.episodes += 1
        try:
            body = {"queries": [sendable(query)], "topk": count, "return_scores": True}
            answer = await self._pool.call(server, "POST", "/retrieve", body)
            documents = answer["result"][0]
            return [_text(d.get("document", d)) for d in documents[:count]]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise EnvironmentFailure(
                f"{server.url}/retrieve answered no passages ({error!r}); is it a retriever?"
            ) from error
        finally:
            server.episodes -= 1


def _meta(folder: Path) -> dict[str, int] | None:
    try:
        found: dict[str, int] = json.loads((folder / META).read_text())
        return found
    except (OSError, ValueError):
        return None


def _build(corpus: Path, folder: Path, source: dict[str, int]) -> None:
    if _meta(folder) == source:  # another process built it while this one waited
        return
    import bm25s

    texts, offsets = [], []
    with corpus.open("rb") as lines:
        offset = 0
        for number, line in enumerate(lines, start=1):
            try:
                texts.append(_text(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{corpus}, line {number}: not a document with contents, or with title and text ({error!r}); fix "
                    "or delete the line"
                ) from error
            offsets.append(offset)
            offset += len(line)
    if not any(text.strip() for text in texts):
        raise ConfigError(f"{corpus}: no documents in it; give at least one")
    index = bm25s.BM25()
    index.index(_words(texts), show_progress=False)
    remedy = "move it away, or the corpus to another folder"
    with (
        results.writing(folder, results.INDEX, [corpus], remedy=remedy) as part,
        disk_errors(folder, "the search index"),
    ):
        index.save(str(part))
        np.save(part / OFFSETS, np.asarray(offsets, dtype=np.int64))
        (part / META).write_text(json.dumps(source))


def _words(texts: list[str]) -> Any:
    import bm25s

    return bm25s.tokenize(texts, stopwords="en", show_progress=False)


def _at(lines: Any, offset: int) -> dict[str, Any]:
    lines.seek(offset)
    found: dict[str, Any] = json.loads(lines.readline())
    return found


def _text(document: dict[str, Any]) -> str:
    if "contents" in document:
        return str(document["contents"])
    return f"{document['title']}\n{document['text']}"
