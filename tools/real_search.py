"""What the real search servers need, on a CPU: a tiny encoder of E5's shape, an exact index, and questions.

    PYTHON tools/real_search.py make FOLDER               corpus.jsonl, encoder/, e5_Flat.index, queries/*.parquet
    PYTHON tools/real_search.py serve agentgym FOLDER HOST PORT CHECKOUT
    PYTHON tools/real_search.py serve search-r1 FOLDER HOST PORT CHECKOUT

PYTHON has torch, transformers, faiss and datasets (and, for AgentGym, its server's packages). Two things differ from
the real setup: the encoder has random weights and 64 dimensions, and `.cuda()` leaves everything on the CPU, because
both programs call it without asking. Search-R1's program listens on port 8000 of all interfaces; here on HOST and PORT.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOWNS = ("Arden", "Belmor", "Corvale", "Dunwick", "Elmsford", "Farrow", "Glenby", "Hartwell", "Isleham", "Jarrow")
SUFFIXES = ("", " Bay", " Hill", " Green")
RIVERS = ("Aller", "Brue", "Colne", "Dove", "Erne", "Fal", "Greta", "Hodder")
QUESTIONS = 20
"""Of each split."""


def facts(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(passage, question, answer) of each town."""
    rng = random.Random(seed)
    for town in (f"{name}{suffix}" for name in TOWNS for suffix in SUFFIXES):
        river, people = rng.choice(RIVERS), rng.randrange(900, 90_000)
        text = f"{town}\n{town} is a town on the river {river}. It has {people} inhabitants and a market hall."
        yield text, f"On which river is the town of {town}?", river


def questions() -> dict[str, list[tuple[str, str]]]:
    """Split -> (question, answer)."""
    asked = [(question, answer) for _, question, answer in facts()]
    return {"train": asked[:QUESTIONS], "test": asked[QUESTIONS : 2 * QUESTIONS]}


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    lines = (json.dumps({"id": str(i), "contents": text}) for i, (text, _, _) in enumerate(facts()))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def make(folder: Path) -> None:
    """Everything that the two servers read."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder)
    encoder = make_encoder(folder / "encoder")
    _write_index(folder, encoder)
    (folder / "queries").mkdir(exist_ok=True)
    for split, asked in questions().items():
        rows = [{"question": q, "reward_model": {"ground_truth": {"target": [a]}}} for q, a in asked]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "queries" / f"{split}.parquet"))


def make_encoder(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, model): BERT as E5 is, with the corpus's words and random weights."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(exist_ok=True)
    words = sorted({w for text, question, _ in facts() for w in _words(f"{text} {question} query passage")})
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", ".", "?"]
    (folder / "vocab.txt").write_text("\n".join(marks + words), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=len(marks) + len(words), initializer_range=0.2, **shape)).eval()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return tokenizer, model


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _write_index(folder: Path, encoder: tuple[Any, Any]) -> None:
    import faiss
    import torch

    tokenizer, model = encoder
    texts = [f"passage: {text}" for text, _, _ in facts()]
    read = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**read).last_hidden_state
    mask = read["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    index = faiss.IndexFlatIP(mean.shape[1])
    index.add(mean.numpy())
    faiss.write_index(index, str(folder / "e5_Flat.index"))


def stay_on_cpu() -> None:
    import torch

    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


def serve(program: str, folder: Path, host: str, port: int, checkout: Path) -> None:
    import uvicorn

    stay_on_cpu()
    folder = folder.resolve()
    if program == "search-r1":
        listen = uvicorn.run
        uvicorn.run = lambda app, **_: listen(app, host=host, port=port)  # type: ignore[assignment]
        given = {"index_path": "e5_Flat.index", "corpus_path": "corpus.jsonl", "retriever_model": "encoder"}
        files = [word for name, path in given.items() for word in (f"--{name}", str(folder / path))]
        script = checkout / "search_r1" / "search" / "retrieval_server.py"
        sys.argv = [str(script), *files, "--topk", "3", "--retriever_name", "e5"]
        runpy.run_path(str(script), run_name="__main__")
        return
    package = folder / f"agentgym.{port}"  # a copy: the server reads its questions from its own package
    shutil.copytree(checkout / "agentenv-searchqa", package)
    shutil.copytree(folder / "queries", package / "agentenv_searchqa" / "queries")
    for name, path in (("INDEX_PATH", "e5_Flat.index"), ("CORPUS_PATH", "corpus.jsonl"), ("MODEL_PATH", "encoder")):
        os.environ[f"SEARCHQA_{'RETRIEVAL_' if name == 'MODEL_PATH' else ''}{name}"] = str(folder / path)
    sys.path.insert(0, str(package))
    uvicorn.run("agentenv_searchqa:app", host=host, port=port)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        serve(sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]), Path(sys.argv[6]))
