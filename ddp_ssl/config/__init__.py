"""The config: its schema and its reader. No torch here."""

from ddp_ssl.config.reader import Resolved, load_as, read_text, read_yaml, tree_of
from ddp_ssl.config.reference import describe_fields, reference, reference_of
from ddp_ssl.config.rules import check_folder, check_world_size
from ddp_ssl.config.schema import (
    NORMALISATION,
    Checkpoint,
    Config,
    Data,
    Eval,
    Log,
    Measure,
    MethodConfig,
    Model,
    Optim,
    Run,
)
from ddp_ssl.config.section import (
    Below1,
    Channels,
    Positive,
    Probability,
    Section,
    Size,
    Strength,
    Temperature,
)
from ddp_ssl.config.views import ViewGroup
from ddp_ssl.errors import ConfigError

__all__ = [
    "NORMALISATION",
    "Below1",
    "Channels",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Data",
    "Eval",
    "Log",
    "Measure",
    "MethodConfig",
    "Model",
    "Optim",
    "Positive",
    "Probability",
    "Resolved",
    "Run",
    "Section",
    "Size",
    "Strength",
    "Temperature",
    "ViewGroup",
    "check_folder",
    "check_world_size",
    "describe_fields",
    "load_as",
    "read_text",
    "read_yaml",
    "reference",
    "reference_of",
    "tree_of",
]
