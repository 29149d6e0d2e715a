"""The settings of a run: typed sections, YAML files, overrides and presets."""

from emr_training.config.reading import ConfigError, dump_config, make_config, merge, parse_override, read_config
from emr_training.config.run import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump_config", "make_config", "merge", "parse_override", "read_config"]
