"""The sets that ICRL (arXiv 2605.15224) trains and evaluates on: where each is published, its columns, how many rows it
has, and each row in our format. `published_files.py` reads and writes the files.

Tasks of AgentGym's servers are numbers, so their sets are lists of ids:

    published  {"item_id": "webshop_5238"} in a JSON list; in ICRL's own code {"task_id": "5238", "metadata": {...}}
    ours       {"task_id": 5238}, with {"metadata": {"subset": "bamboogle"}} for SearchQA

Mathematics becomes {"prompt": problem, "label": answer}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from icrl_megatron.tasks import columns
from icrl_megatron.tasks.answers import last_box
from icrl_megatron.tasks.columns import Columns, Fields
from icrl_megatron.tasks.row_shapes import WrongRow
from icrl_megatron.types import Split

SOURCES, WRITTEN = Path("sources"), Path("data")
"""Below the working directory: where `icrl data` looks for local copies, and where it writes."""
SEARCHQA_SUBSETS: dict[str, range] = {
    "nq": range(3610),
    "triviaqa": range(3610, 14923),
    "popqa": range(14923, 29190),
    "hotpotqa": range(29190, 36595),
    "2wikimultihopqa": range(36595, 49171),
    "musique": range(49171, 51588),
    "bamboogle": range(51588, 51713),
}
"""Task ids of AgentGym's SearchQA server: its test questions, in the order of the data sets that they come from."""
SEARCHQA_TRAIN: dict[str, range] = {"nq": range(51713, 130881), "hotpotqa": range(130881, 221328)}
"""The same for its training questions."""
ASK_FOR_BOX = "Please reason step by step, and put your final answer within \\boxed{}."
"""Ends every problem of Critique-GRPO's files. Our task set asks for the box itself."""


@dataclass(frozen=True)
class Source:
    """A public repository."""

    repository: str
    license: str
    """As published."""
    hub: bool = True
    """On the Hugging Face Hub, as a data set; else on GitHub."""
    only: str = ""
    """The part of a large repository that is needed, as a pattern of the Hub."""

    @property
    def folder(self) -> Path:
        """Where `get` puts it."""
        return SOURCES / self.repository.rpartition("/")[2]

    @property
    def url(self) -> str:
        return f"https://{'huggingface.co/datasets' if self.hub else 'github.com'}/{self.repository}"

    @property
    def get(self) -> str:
        """The command that downloads it."""
        if self.hub:
            only = f" --include '{self.only}'" if self.only else ""
            return f"hf download {self.repository} --repo-type dataset{only} --local-dir {self.folder}"
        return f"git clone {self.url} {self.folder}"


@dataclass(frozen=True)
class Published:
    about: str
    task: str
    """Task set."""
    split: Split
    source: Source
    file: str
    """In the repository, as a pattern."""
    columns: tuple[str, ...]
    """That a row must have. Alternatives are separated by |."""
    convert: Callable[[Fields, str], Mapping[str, Any]]
    """A row and its place in our format. Raises WrongRow, and ConfigError with the place."""
    rows: int | None
    """How many rows it has; None if we do not know: then `blob` identifies the file."""
    ids: range | None = None
    """Its ids where they are all of a range; settings then name the range instead of a file."""
    blob: str = ""
    """Git's id of the file."""


def entry(name: str, folder: Path = WRITTEN) -> str:
    """What `data.train` or `data.heldout` names: the range of ids, or the file that `icrl data` writes to `folder`."""
    ids = SETS[name].ids
    return f"{ids.start}:{ids.stop}" if ids is not None else str(folder / f"{name}.jsonl")


def hint(given: str) -> str:
    """For the error about a file that is missing: how to write it, or nothing if `icrl data` does not write it."""
    path = Path(given)
    return f"; `icrl data {path.stem}` writes it" if path.suffix == ".jsonl" and path.stem in SETS else ""


def _task(row: Fields, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {"task_id": _numbered(row, names)[1]}


def _numbered(row: Fields, names: tuple[str, ...]) -> tuple[str, int]:
    """(name, number) of an id NAME_NUMBER; the name is empty for a bare number."""
    given = str(row["item_id"] if "item_id" in row else row["task_id"])
    match = re.fullmatch(r"(?:([^_]+)_)?([0-9]{1,9})", given)
    if match is None or match[1] not in (None, *names):
        raise WrongRow(f"the id {given!r:.60} is neither a number nor {names[0]}_NUMBER")
    return match[1] or "", int(match[2])


def _question(row: Fields, where: str, subsets: Mapping[str, range]) -> dict[str, Any]:
    """A SearchQA id with the data set that it comes from. Its number says which; a row that names another is wrong."""
    name, number = _numbered(row, ("searchqa", *subsets))
    subset = next((one for one, ids in subsets.items() if number in ids), None)
    if subset is None:
        raise WrongRow(f"task {number} is not in {', '.join(f'{i.start}:{i.stop}' for i in subsets.values())}")
    stated = columns.at_path(row, "metadata.subset")
    for said in (name if name != "searchqa" else "", "" if stated is columns.MISSING else str(stated)):
        if said and said != subset:
            raise WrongRow(f"task {number} is of {subset} on AgentGym's server, and the row says {said!r:.60}")
    return {"task_id": number, "metadata": {"subset": subset}}


def _problem(row: Fields, where: str, of: Columns) -> dict[str, Any]:
    found = columns.texts(row, of, where, "heldout", join=True)
    return {"prompt": found.prompt, "label": found.label}


def _boxed(row: Fields, where: str) -> dict[str, Any]:
    made = _problem(row, where, Columns("problem", "solution"))
    if (answer := last_box(made["label"])) is None:
        raise WrongRow(f"its solution {made['label']!r:.60} has no \\boxed answer")
    return made | {"label": answer}


def _olympiad(row: Fields, where: str) -> dict[str, Any]:
    """Its list of final answers has all of them, where ours would have alternatives: they become one text."""
    answers = row["final_answer"]
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        raise WrongRow(f"final_answer is {answers!r:.60}, where a list of texts is expected")
    joined = {**row, "final_answer": ", ".join(answers)}
    return _problem(joined, where, Columns("question", "final_answer"))


def _critique_grpo(row: Fields, where: str) -> dict[str, Any]:
    """The user's message without what asks for the box, and without the system message, which names an assistant."""
    messages = row["prompt"]
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
        raise WrongRow(f"prompt is {messages!r:.60}, where a list of messages is expected")
    asked = {**row, "prompt": [one for one in messages if one.get("role") != "system"]}
    made = _problem(asked, where, Columns("prompt", "reward_model.ground_truth"))
    prompt = made["prompt"].rstrip().removesuffix(ASK_FOR_BOX).rstrip()
    if not prompt:
        raise WrongRow("its prompt has no problem")
    return made | {"prompt": prompt}


AGENTGYM = Source("AgentGym/AgentGym-RL-Data-ID", "cc-by-nc-4.0")
NO_LICENSE = "none stated"


def _ids(
    task: str, split: Split, rows: int, ids: range | None = None, subsets: Mapping[str, range] | None = None
) -> Published:
    name = f"{task}_{'train' if split == 'train' else 'test'}"
    convert = partial(_task, names=(task,)) if subsets is None else partial(_question, subsets=subsets)
    about = "task ids" if subsets is None else f"task ids of {len(subsets)} subsets"
    return Published(about, task, split, AGENTGYM, f"**/{name}.json*", ("item_id|task_id",), convert, rows, ids)


def _mathematics(about: str, source: Source, file: str, of: tuple[str, str], rows: int) -> Published:
    return Published(about, "math", "heldout", source, file, of, partial(_problem, of=Columns(*of)), rows)


SETS: dict[str, Published] = {
    "alfworld_train": _ids("alfworld", "train", 2420, range(2420)),
    "alfworld_test": _ids("alfworld", "heldout", 200, range(2420, 2620)),
    "sciworld_train": _ids("sciworld", "train", 2120),
    "sciworld_test": _ids("sciworld", "heldout", 200),
    "webshop_train": _ids("webshop", "train", 3930),
    "webshop_test": _ids("webshop", "heldout", 200),
    "searchqa_train": _ids("searchqa", "train", 169_615, range(51713, 221328), SEARCHQA_TRAIN),
    "searchqa_test": _ids("searchqa", "heldout", 400, subsets=SEARCHQA_SUBSETS),
    "openr1_math_4k": Published(
        "Critique-GRPO's problems",
        "math",
        "train",
        Source("zhangxy-2019/critique-GRPO", NO_LICENSE, hub=False),
        "openr1_math_4k_train_qwenformat/train.parquet",
        ("prompt", "reward_model.ground_truth"),
        _critique_grpo,
        rows=None,
        blob="370215d74d87e6f04e048294c4405f19418e74fe",
    ),
    "math500": _mathematics(
        "MATH500", Source("HuggingFaceH4/MATH-500", NO_LICENSE), "test.jsonl", ("problem", "answer"), 500
    ),
    "minerva": _mathematics(
        "Minerva", Source("math-ai/minervamath", NO_LICENSE), "test.jsonl", ("question", "answer"), 272
    ),
    "olympiadbench": Published(
        "OlympiadBench, OE_TO_maths_en",
        "math",
        "heldout",
        Source("Hothan/OlympiadBench", "apache-2.0", only="*OE_TO_maths_en_COMP*"),
        "**/OE_TO_maths_en_COMP/**/*.parquet",
        ("question", "final_answer"),
        _olympiad,
        rows=674,
    ),
    "aime24": Published(
        "AIME 2024",
        "math",
        "heldout",
        Source("math-ai/aime24", NO_LICENSE),
        "test*.parquet",
        ("problem", "solution"),
        _boxed,
        rows=30,
    ),
    "amc23": _mathematics("AMC 2023", Source("math-ai/amc23", NO_LICENSE), "test*.parquet", ("question", "answer"), 40),
}
"""By name: that of its file."""
MATH_TESTS = ("math500", "minerva", "olympiadbench", "aime24", "amc23")
"""The sets of the paper's average over mathematics."""
