"""How a config file and the command line become a Detectron2 config with this project's keys, checked on the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import OmegaConf

from .settings import add_xlearner_config
from .specs import ConfigError, nearest

#: What YAML reads keys as: a text, or the sign for those of another mapping.
_NAME, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def _node_problems(node: yaml.Node, *, trusted: bool, path: str = "", above: tuple[yaml.Node, ...] = ()) -> list[str]:
    """Keys given twice in one YAML mapping, which a reader would merge silently, and values that run code when read."""
    name = path.removesuffix(".") or "The file"
    if node in above:
        return [f"{name} contains itself."]
    if not trusted and node.tag not in yaml.SafeLoader.yaml_constructors:
        line = node.start_mark.line + 1
        return [f"{name} has the YAML tag {node.tag!r} in line {line}, but plain values are expected."]
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [p for child in node.value for p in _node_problems(child, trusted=trusted, path=path, above=above)]
    if not isinstance(node, yaml.MappingNode):
        return []
    found, seen = [], set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            found.append(f"{name} has a key in line {line} that is no name.")
            continue
        if key.tag not in (_NAME, _MERGE):
            kind = key.tag.rpartition(":")[2]
            text = f"in line {line} is read as a value of the kind {kind}, but a name is expected: put it in quotes"
            found.append(f"{path}{key.value} {text}.")
        if key.value in seen:
            found.append(f"{path}{key.value} is given twice (the second time in line {line}).")
        seen.add(key.value)
        found += _node_problems(value, trusted=trusted, path=f"{path}{key.value}.", above=above)
    return found


def check_config_file(path: str | Path, *, derived: tuple[Path, ...] = ()) -> None:
    """See that ``path`` and the files it is based on are YAML mappings without double keys and without code.

    A file that passes can be read with ``allow_unsafe=True``: only Detectron2's model zoo may have tags that run
    code, because the model zoo computes RetinaNet's anchor sizes in one.

    Args:
        derived: files that are based on ``path``.

    Raises:
        ConfigError: with the problems of the first file that has any.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError([f"There is no config file {path}."])
    if path.suffix == ".py":
        raise ConfigError([f"{path} is a Python config, which train_net.py reads, but a YAML file is expected here."])
    if path.resolve() in derived:
        raise ConfigError([f"{path} is based on itself through _BASE_."])
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([f"{path} should hold a mapping such as 'XLEARNER: …'."])
    # In a Detectron2 that was built from its repository, this folder is a link to one outside the package.
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    trusted = path.resolve().is_relative_to(zoo.resolve())
    problems = _node_problems(node, trusted=trusted)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    for key, value in node.value:
        if key.value == "_BASE_":
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(base, yaml.ScalarNode):
                    raise ConfigError([f"{path}: _BASE_ should be a file or a list of files."])
                check_config_file(path.parent / Path(base.value).expanduser(), derived=(*derived, path.resolve()))


def _decode(key: str, text: Any) -> Any:
    """A value of the command line, read as in a file: YAML, and numbers such as 1e-3, which only yacs takes for one."""
    if text == "":
        return text
    try:
        return CfgNode._decode_cfg_value(yaml.safe_load(text) if isinstance(text, str) else text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{key}: {text!r} is not valid YAML: {error}"]) from error


def _merge_free_overrides(cfg: CfgNode, opts: Sequence[str]) -> list[str]:
    """Apply the pairs that may set new keys, and return the others, as yacs accepts only keys that exist already.

    These are ``XLEARNER.{SOURCES,DATASETS,PROBES,BRANCHES}.name[.KEY]`` and ``TRANSFER.{SETS,PROTOCOLS}.name[.KEY]``,
    as a record may leave keys at their defaults, and ``XLEARNER.SQUEEZE.SOLVER.KEY``.
    """
    rest: list[str] = []
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        match key.split("."):
            case ["XLEARNER" as part, "SOURCES" | "DATASETS" | "PROBES" as kind, name] | [
                "TRANSFER" as part,
                "SETS" | "PROTOCOLS" as kind,
                name,
            ]:
                cfg[part][kind][name] = _decode(key, text)
            case ["XLEARNER" as part, "SOURCES" | "DATASETS" | "PROBES" as kind, name, inner] | [
                "TRANSFER" as part,
                "SETS" | "PROTOCOLS" as kind,
                name,
                inner,
            ]:
                records = cfg[part][kind]
                if not isinstance(records.get(name), CfgNode):
                    raise ConfigError([f"{key}: there is no such record.{nearest(name, records)}"])
                records[name][inner] = _decode(key, text)
            case ["XLEARNER", "BRANCHES", name, inner]:  # of a record that need not be there
                record = cfg.XLEARNER.BRANCHES.get(name)
                cfg.XLEARNER.BRANCHES[name] = CfgNode({**(record or {}), inner: _decode(key, text)})
            case ["XLEARNER", "BRANCHES", name]:
                cfg.XLEARNER.BRANCHES[name] = _decode(key, text)
            case ["XLEARNER" as part, "FREEZE" as kind]:  # names, which yacs would want in quotes
                cfg[part][kind] = _decode(key, text)
            case ["XLEARNER", "SQUEEZE", "SOLVER" | "TASK_WEIGHTS" as kind, inner]:
                cfg.XLEARNER.SQUEEZE[kind][inner] = _decode(key, text)
            case _:
                rest += [key, text]
    return rest


def _check_known(cfg: CfgNode, opts: Sequence[str]) -> list[str]:
    """Problems of command-line keys that no section knows, with the nearest known key."""
    problems = []
    for key in opts[::2]:
        node: Any = cfg
        for number, part in enumerate(key.split(".")):
            if not isinstance(node, CfgNode) or (part not in node and not node.is_new_allowed()):
                known = node if isinstance(node, CfgNode) else ()
                prefix = ".".join(key.split(".")[:number])
                problems.append(f"There is no setting {key} (below {prefix or 'the top'}).{nearest(part, known)}")
                break
            node = node.get(part)
            if node is None:
                break
    return problems


def default_config() -> CfgNode:
    """Detectron2's config with the keys of this project, all at their defaults."""
    cfg = get_cfg()
    add_xlearner_config(cfg)
    return cfg


def read_python_settings(path: str | Path) -> CfgNode:
    """Run a Python config, as Detectron2's LazyConfig does, and return its ``settings``.

    Raises:
        ConfigError: when the file is not there, fails, or has no settings.
    """
    if not Path(path).is_file():
        raise ConfigError([f"There is no config file {path}."])
    try:
        found = LazyConfig.load(str(path))
        settings = OmegaConf.to_container(found.settings, resolve=True) if "settings" in found else None
    except ConfigError:
        raise
    except Exception as error:  # it may be anything, as the file is a program
        raise ConfigError([f"{path}: {type(error).__name__}: {error}"]) from error
    if not isinstance(settings, dict):
        raise ConfigError([f"{path} should define 'settings', a dict with the keys of a YAML config."])
    return CfgNode(settings)


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file, then the overrides of the command line, into a new Detectron2 config.

    Args:
        config_file: YAML, which is read without running code; or Python (``.py``), which is run.
        opts: keys and values in turn.

    Raises:
        ConfigError: for a missing, malformed or contradictory file and for unknown or ill-typed settings.
    """
    cfg = default_config()
    python = Path(config_file).suffix == ".py"
    if not python:
        check_config_file(config_file)
    try:
        if python:
            cfg.merge_from_other_cfg(read_python_settings(config_file))
        else:
            cfg.merge_from_file(str(config_file), allow_unsafe=True)  # checked above
    except KeyError as error:  # yacs's, of the first name that it does not know
        name = str(error.args[0]).rpartition(": ")[2]
        raise ConfigError(_check_known(cfg, [name, ""]) or [str(error.args[0])], what=str(config_file)) from error
    except (ValueError, AssertionError, yaml.YAMLError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError([f"{config_file}: {error}"]) from error
    opts = list(opts)
    if len(opts) % 2:
        raise ConfigError([f"The settings after the options should be pairs of key and value, got {opts}."])
    opts = _merge_free_overrides(cfg, opts)
    problems = _check_known(cfg, opts)
    if problems:
        raise ConfigError(problems, what="The command line")
    try:
        cfg.merge_from_list(opts)
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError([f"The command line: {error}"]) from error
    if empty := _fill_texts(cfg, default_config()):
        raise ConfigError([f"{name} is empty (null), but its default is {value!r}." for name, value in empty])
    return cfg


def _fill_texts(cfg: CfgNode, default: CfgNode, prefix: str = "") -> list[tuple[str, Any]]:
    """Make null settings "" that are so by default, as a sign for none; the names of others, and their defaults.

    yacs takes null for any kind. Records, which have no default, may be dropped so.
    """
    empty = []
    for key, usual in default.items():
        value = cfg.get(key)
        if value is None and usual == "":
            cfg[key] = usual
        elif value is None and usual is not None:
            empty.append((prefix + key, usual))
        elif isinstance(value, CfgNode) and isinstance(usual, CfgNode):
            empty += _fill_texts(value, usual, f"{prefix}{key}.")
    return empty
