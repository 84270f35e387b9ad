"""From a recipe's name and `key=value` overrides to `Settings`, and to and from the YAML saved with a run.

OmegaConf does the merging and the type checks; what it says of a mistake is turned into one message that names the
setting, the value and what was expected. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from icrl_megatron.settings.names import ENTRY, indexed, initials_of, nearest
from icrl_megatron.settings.presets import apply_preset, paper_evaluation
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import SOURCES, no_option, options, source_class, source_of
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.settings.values import describe, parse, parse_file, pasted
from icrl_megatron.utils import user_code
from icrl_megatron.utils.errors import ConfigError, did_you_mean
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.user_code import is_own

SAVED_NAME = "settings.yaml"
"""File in a run folder that holds its resolved settings."""
KEPT_MODEL = "model_files"
"""Folder in a run folder with what the model's folder has besides weights."""

YAML = (".yaml", ".yml")
"""Endings of files of settings, which `icrl train` takes in place of a recipe's name."""

_REFUSED = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
"""What other trainers let one set, and what would make the engine sample from another distribution."""

_TASK_SETS = re.compile(r"tasks|tasks\.sources(\.\d+(\.name)?)?")
"""Settings that say which task sets there are."""


def load(recipe: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a recipe with overrides such as "optim.learning_rate=1e-5" or "tasks.sources.0.weight=2".

    Raises ConfigError on an unknown recipe or setting (with the nearest valid name) and on a value of a wrong type.
    """
    settings = from_recipe(recipe)
    return apply_overrides(settings, overrides) if overrides or is_own(recipe) else settings


def from_recipe(recipe: str) -> Settings:
    """What a recipe's function returns: one of `icrl_recipes`, or a user's own (my_recipe.py:run). Or the settings of a
    YAML file, with defaults for what it does not set. Raises ConfigError on an unknown name and an invalid file."""
    from icrl_recipes import registry

    if is_own(recipe):
        return _own_recipe(recipe)
    if recipe.endswith(YAML):
        return _from_yaml(Path(recipe))
    recipes = registry()
    if recipe in recipes:
        return recipes[recipe]()
    hint = did_you_mean(recipe, recipes, f"there are {', '.join(recipes)}", cutoff=0.4, most=3)
    raise ConfigError(
        f"unknown recipe {recipe!r}: {hint} (`icrl recipes` lists them; your own: my_recipe.py:run or settings.yaml)"
    )


def _own_recipe(recipe: str) -> Settings:
    function = user_code.load(recipe, "recipe")
    try:
        settings = function()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"recipe {recipe} raises {user_code.raised_at(error)}; correct the function") from error
    if not isinstance(settings, Settings):
        raise ConfigError(
            f"recipe {recipe} returns {type(settings).__name__}; return icrl_megatron.settings.schema.Settings"
        )
    return settings


def _from_yaml(path: Path) -> Settings:
    try:
        return _read(path)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(
            f"{path}: cannot be read as settings ({_first_line(error)}); `icrl settings` lists all settings"
        ) from error


def apply_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """A copy of `settings` with the overrides merged in, in order; presets (`algo.preset`, `eval.preset`) and task sets
    come before all others, so an explicit value replaces the preset's, and options are those of the final task set.
    Raises ConfigError as `load` does."""
    pairs = sorted(map(_split, overrides), key=lambda pair: not _TASK_SETS.fullmatch(pair[0]))
    for key, raw in pairs:
        if key == "algo.preset":
            settings = apply_preset(settings, raw)
        if (key, raw) == ("eval.preset", "paper"):
            settings = paper_evaluation(settings)
    config: DictConfig = OmegaConf.structured(settings)
    for key, raw in pairs:
        config = _merge(config, key, raw)
    return _to_settings(config, "the overrides")


def run_folder(settings: Settings) -> Path:
    """Where the run writes: `run_dir`, or runs/<name> under the working directory."""
    return Path(settings.run_dir) if settings.run_dir else Path("runs") / settings.name


def model_folder(settings: Settings) -> Path:
    """`model.path`. Where that folder is gone, the copy of it without weights that the run folder holds: a run that has
    a checkpoint can continue with that."""
    folder = Path(settings.model.path)
    kept = (run_folder(settings) / KEPT_MODEL, run_folder(settings) / "warm_start" / KEPT_MODEL)
    return folder if folder.is_dir() else next((k for k in kept if (k / "config.json").is_file()), folder)


def to_yaml(settings: Settings) -> str:
    """All settings as YAML, in the order of `settings/schema.py`."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def save(settings: Settings, path: Path) -> None:
    """Writes the YAML that `load_saved` reads; the file appears whole or not at all."""
    write_atomically(path, to_yaml(settings).splitlines(), "the settings")


def load_saved(path: Path) -> Settings:
    """Reads what `save` wrote. Raises ConfigError when the file is missing, unreadable or of another version."""
    try:
        return _read(path)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(
            f"{path}: not the saved settings of a run of this version ({_first_line(error)}); restore the file, or "
            "choose another run_dir"
        ) from error


def _read(path: Path) -> Settings:
    given = _with_sources(parse_file(path.read_text(encoding="utf-8"), Settings))
    return _to_settings(OmegaConf.merge(_defaults(), given), "the file")


@functools.cache
def _defaults() -> DictConfig:
    """All settings. It takes long to build, and `OmegaConf.merge` copies it."""
    config: DictConfig = OmegaConf.structured(Settings)
    return config


@functools.cache
def field_types(task_set: str = "") -> Mapping[str, Any]:
    """Dotted name -> type of every setting and section; elements of lists appear without their index. Entries of
    `tasks.sources` have the options of all task sets, or of the one that is named."""
    found: dict[str, Any] = {}

    def walk(cls: type, prefix: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            dotted = prefix + name
            found[dotted] = hint
            inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
            entries = (source_class(task_set),) if task_set else (TaskSource, *SOURCES.values())
            for section in entries if inner is TaskSource else (inner,):
                if isinstance(section, type):
                    walk(section, dotted + ".")

    walk(Settings, "")
    return types.MappingProxyType(found)


def named_like(name: str) -> tuple[str, ...]:
    """The settings that `name` may mean: the one of that dotted name, or all with that last part or its initials."""
    known = {n: hint for n, hint in field_types().items() if not dataclasses.is_dataclass(hint)}
    if re.sub(r"\.\d+(?=\.|$)", "", name) in known:
        return (name if re.search(r"\.\d", name) else indexed(name, field_types()),)
    leaves = {n: n.rpartition(".")[2] for n in known}
    found = [n for n, leaf in leaves.items() if leaf == name]
    found = found or [n for n, leaf in leaves.items() if "_" in leaf and initials_of(leaf) == name]
    return tuple(indexed(n, field_types()) for n in found)


def changed(one: Settings, other: Settings) -> dict[str, tuple[object, object]]:
    """Dotted name -> (value in `one`, value in `other`) of every setting in which the two differ."""
    left, right = _flat(dataclasses.asdict(one)), _flat(dataclasses.asdict(other))
    names = [*left, *(name for name in right if name not in left)]
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def _split(override: str) -> tuple[str, str]:
    """ "steps=100" -> ("steps", "100"). Raises ConfigError on text that is no override."""
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is not an override: write name=value, e.g. steps=100")
    name = re.sub(r"\[(-?\d+)\]", r".\1", key.strip())
    if name[0] == "+" or re.search(r"\.-\d+", name):
        right = re.sub(r"\.-\d+", ".0", name.lstrip("+"))
        raise ConfigError(
            f"{override}: settings are changed without +, and elements are counted from 0; write "
            f"{pasted(right, raw.strip())}"
        )
    return name, raw.strip()


def _merge(config: DictConfig, key: str, raw: str) -> DictConfig:
    source = _entry(config, key)
    hint = _type_of(key, source, raw, config)
    value = parse(key, raw, hint, OmegaConf.select(config, key))
    try:
        if re.search(r"\.\d+(\.|$)", key):  # merging cannot reach into a list
            _begin_list(config, key, source)
            _check_index(config, key, raw)
            if source is not None:
                _fit(config, key, value, source)
            OmegaConf.update(config, key, value)
            return config
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config.merge_with(_with_sources(nested))  # in place: OmegaConf.merge would copy all settings first
        return config
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{key}={raw}: expected {describe(hint)} ({_first_line(error)})") from error


def _entry(config: DictConfig, key: str) -> TaskSource | None:
    """The entry of `tasks.sources` that `key` names, or is an option of."""
    at, sources = ENTRY.fullmatch(key), config.tasks.sources
    if not at or int(at[1]) >= len(sources):
        return None
    return typing.cast(TaskSource, OmegaConf.to_object(sources[int(at[1])]))


def _fit(config: DictConfig, key: str, value: Any, source: TaskSource) -> None:
    """Gives the entry the class of its new task set, if `value` names one, with that task set's defaults. Raises
    ConfigError if `value` is a mapping with an option that the task set does not have."""
    at, given = ENTRY.fullmatch(key), value if isinstance(value, dict) else {}
    assert at is not None
    name = {".name": value, None: given.get("name")}.get(at[2])
    if name is not None and source_class(name) is not type(source):
        source = dataclasses.replace(source_of(name), weight=source.weight)
        config.tasks.sources[int(at[1])] = OmegaConf.structured(source)
    for option in _flat(given, f"{key}.") if given else ():
        _type_of(option, source)


def _with_sources(given: dict[str, Any]) -> dict[str, Any]:
    """Settings as mappings, where each entry of `tasks.sources` has the class of its task set. Raises ConfigError for
    an unknown setting, and for an option that the entry's task set does not have."""
    for name in _flat(given):
        if not ENTRY.fullmatch(name):
            _type_of(name, None)
    tasks = given.get("tasks")
    if not isinstance(tasks, dict) or not isinstance(tasks.get("sources"), list):
        return given
    return {**given, "tasks": {**tasks, "sources": [_source(i, entry) for i, entry in enumerate(tasks["sources"])]}}


def _source(index: int, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    source = source_of(str(entry.get("name", TaskSource.name)))
    for name in _flat(entry, f"tasks.sources.{index}."):
        _type_of(name, source)
    return OmegaConf.merge(OmegaConf.structured(source), entry)


def _begin_list(config: DictConfig, key: str, source: TaskSource | None) -> None:
    """Gives an empty list its first element, with default values, if that is what the key sets a value of."""
    name, index, _ = key.rpartition(".0.")
    kinds = typing.get_args(field_types(source.name if source else "").get(re.sub(r"\.\d+", "", name)))
    if index and kinds and dataclasses.is_dataclass(kinds[0]) and OmegaConf.select(config, name) == []:
        OmegaConf.update(config, name, [typing.cast(type, kinds[0])()])


def _check_index(config: DictConfig, key: str, raw: str) -> None:
    """Raises ConfigError if `key` has an index that its list does not have."""
    for at in re.finditer(r"\.(\d+)(?=\.|$)", key):
        name, elements = key[: at.start()], OmegaConf.select(config, key[: at.start()])
        if int(at[1]) < len(elements):
            continue
        last = f"{name}.{max(len(elements) - 1, 0)}{key[at.end() :]}"
        whole = at.end() == len(key) and not elements
        remedy = pasted(name, f"[{raw}]") if whole else pasted(last, raw)
        raise ConfigError(
            f"{key}={raw}: there is no such element, {name} has {len(elements)}; set the whole list, or write {remedy}"
        )


def _type_of(key: str, source: TaskSource | None, raw: str = "", config: DictConfig | None = None) -> Any:
    """The declared type of a setting; `source` is the entry of `tasks.sources` that it belongs to, if any. Raises
    ConfigError with the nearest valid name when there is none, and for an option of another task set. For the remedy,
    `raw` is the value and `config` has the entries of `tasks.sources`."""
    known = field_types(source.name if source else "")
    dotted = re.sub(r"\.\d+(?=\.|$)", "", key)
    if dotted in known:
        hint = known[dotted]
        element = typing.get_args(hint) if re.search(r"\.\d+$", key) and typing.get_origin(hint) is list else ()
        return (type(source) if source and element[0] is TaskSource else element[0]) if element else hint
    if source and dotted in field_types():
        raise no_option(key, source)
    section, _, _ = dotted.rpartition(".")
    if dotted.rpartition(".")[2] in _REFUSED:
        raise ConfigError(
            f"{key}: there is no such sampling here, log-probs would not be those of the policy that is trained; "
            "rollout.temperature is all"
        )
    if typing.get_origin(known.get(section)) is dict:
        return typing.get_args(known[section])[1]
    if any(_is_open(known.get(above)) for above in itertools.accumulate(section.split("."), "{}.{}".format)):
        return Any
    near = nearest(key, section, dotted.rpartition(".")[2], known)
    name = key.rpartition(".")[2]
    if near:
        written = f" {_instead(key, near, raw, config)}" if raw else ""
        raise ConfigError(f"unknown setting {key!r}: did you mean {near}?{written}")
    siblings = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == section]
    if section in known and siblings:
        raise ConfigError(f"unknown setting {key!r}: {section} has {', '.join(siblings)}; leave {name} out")
    raise ConfigError(f"unknown setting {key!r}: leave it out; `icrl settings` lists all settings")


def _is_open(hint: Any) -> bool:
    """Whether a setting is a mapping whose values may be mappings and lists themselves, such as another package's
    arguments."""
    return typing.get_origin(hint) is dict and typing.get_args(hint)[1] is Any


def _instead(key: str, near: str, raw: str, config: DictConfig | None) -> str:
    """What to write: the setting `near`, or, if that is an option of a task set, all entries of `tasks.sources` with
    that option."""
    at = ENTRY.fullmatch(near)
    if config is None or at is None or at[2] is None or ENTRY.fullmatch(key):
        return f"Write {pasted(near, raw)}"
    entries = typing.cast(list[TaskSource], OmegaConf.to_object(config.tasks.sources))
    having = [i for i, entry in enumerate(entries) if at[2][1:] in dict(options(entry))]
    if not having:
        names = ", ".join(dict.fromkeys(entry.name for entry in entries))
        return f"No task set of this run ({names}) has that option: leave it out"
    return f"Write {' '.join(pasted(f'tasks.sources.{i}{at[2]}', raw) for i in having)}"


def _to_settings(config: Any, where: str) -> Settings:
    try:
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    assert isinstance(settings, Settings)
    _check_elements(settings, "")
    return settings


def _check_elements(section: Any, prefix: str) -> None:
    """Raises ConfigError for a mapping or a list inside a list of texts, which OmegaConf lets in."""
    for name, hint in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if _is_open(hint):
            continue
        elements = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        for element in elements:
            if dataclasses.is_dataclass(element):
                _check_elements(element, f"{prefix}{name}.")
            elif isinstance(element, list | dict):
                raise ConfigError(f"{prefix}{name}: expected {describe(hint)}, and {element!r} is in it: quote it")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _flat(value: Any, prefix: str = "") -> dict[str, object]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
