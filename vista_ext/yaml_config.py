"""YAML files and command-line overrides as dataclasses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from vista_ext._extras import require

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot be used: names the key, what was expected and what was found."""


def read_config(kind: type[Config], path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration of some dataclass, nested ones included; ranges are the caller's business.

    Args:
        kind: of the configuration, its defaults included.
        path: a YAML file; None for the defaults.
        overrides: such as "train.epochs=3"; they win over the file.

    Raises:
        ConfigError: for a file or an override that cannot be read, a key that does not exist, a value of the wrong
            type.
    """
    omegaconf = require("omegaconf", extra="run")
    for override in overrides:
        if not re.match(r"[A-Za-z_]\w*(\.\w+)*=", override):
            raise ConfigError(f"override must look like key=value, found {override!r}")
    merged = omegaconf.OmegaConf.structured(kind)
    where = "overrides"
    try:
        if path is not None:
            where = str(path)
            given = omegaconf.OmegaConf.load(path)
            if not isinstance(given, omegaconf.DictConfig):
                raise ConfigError(f"{path}: expected keys and values, found a list")
            merged = omegaconf.OmegaConf.merge(merged, given)
        where = "overrides"
        merged = omegaconf.OmegaConf.merge(merged, omegaconf.OmegaConf.from_dotlist(list(overrides)))
        config: Config = omegaconf.OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        key = f" {error.full_key}:" if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{where}:{key} {str(error).splitlines()[0]}") from error
    except (OSError, UnicodeDecodeError, require("yaml", extra="run").YAMLError) as error:
        raise ConfigError(f"{where}: expected a YAML file, found: {' '.join(str(error).split())}") from error
    return config
