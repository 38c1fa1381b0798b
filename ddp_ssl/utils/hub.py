"""Models on the Hugging Face hub, as timm keeps them there.

The hub's own client reads the user's token (`HF_TOKEN`, or what `hf auth login` keeps).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from ddp_ssl.errors import ConfigError, refused

PREFIX = "hf-hub:"
# For the hub's first answer: its client would try again for minutes. The variable is the client's.
PATIENCE_S = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 2)
UNREACHABLE = (
    "{0.ENDPOINT} cannot be reached, and its cache on this machine ({0.HF_HUB_CACHE}) does not "
    "have it"
)


@functools.cache
def answers(endpoint: str) -> bool:
    """Whether the hub answers at all; asked once in a process, with the client's own settings."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    heard: list[object] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            heard.append(get_session().head(endpoint, timeout=PATIENCE_S))

    # In a thread: looking up a name and trying several addresses have no limit of their own.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return bool(heard)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """In this context a hub that does not answer is replaced by its cache, at once.

    Raises `OSError`, one line, for what is in neither.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answers(constants.ENDPOINT)
    try:
        yield
    except LocalEntryNotFoundError:
        raise OSError(UNREACHABLE.format(constants)) from None
    finally:
        constants.HF_HUB_OFFLINE = before


def require(name: str) -> None:
    """Raise `ConfigError` unless the hub answers, or its cache on this machine has the model.

    Imports neither torch nor timm, which take seconds.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    with refused(f"{name}: no model of timm's can be fetched"):
        kept = try_to_load_from_cache(repository, "config.json", revision=revision or None)
        if not isinstance(kept, str) and not answers(constants.ENDPOINT):
            raise OSError(UNREACHABLE.format(constants))


def described(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What `config.json` of `hf-hub:USER/NAME[@REVISION]` says: architecture, arguments, the rest.

    The arguments are those of `timm.create_model`. The rest is the mean, the standard deviation and
    the classifier's names alone: other entries may name files and loaders.

    Raises `ConfigError`, one line.
    """
    from timm.models import load_model_config_from_hf

    with refused(f"{name}: no model of timm's can be fetched"), no_waiting():
        said, architecture, arguments = load_model_config_from_hf(name.removeprefix(PREFIX))
        arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
        if said.get("fixed_input_size"):
            arguments = {"img_size": list(said["input_size"][1:]), **arguments}
        taken = {key: [float(v) for v in said[key]] for key in ("mean", "std") if key in said}
        return str(architecture), arguments, {**taken, "classifier": said.get("classifier")}


def weights_of(name: str, backbone: str) -> dict[str, Any]:
    """Arguments with which `timm.create_model` makes `backbone` with the hub's weights, strictly.

    The file is safetensors, or a pickle of which tensors alone are read: no code of it runs.
    Raises `ConfigError`, one line.
    """
    from timm.models import load_state_dict_from_hf

    if not name.startswith(PREFIX):
        raise ConfigError(
            f"model.backbone_args: pretrained: {name} given; true, for timm's own weights, or "
            f"{PREFIX}USER/NAME is accepted"
        )
    architecture, _, said = described(name)
    if architecture != backbone.partition(".")[0]:
        raise ConfigError(
            f"model.backbone: {backbone} given, {name} is another one; {architecture} is accepted"
        )
    with refused(f"{name}: its weights cannot be fetched"), no_waiting():
        weights = load_state_dict_from_hf(name.removeprefix(PREFIX), weights_only=True)
        tops = said.pop("classifier") or ()
        heads = tuple(f"{top}." for top in ([tops] if isinstance(tops, str) else tops))
        weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    # Over timm's own settings of the backbone, which fix the image size of some.
    overlay = {**said, "num_classes": 0, "state_dict": weights}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def check_push(repository: str) -> None:
    """Raise `ConfigError` unless this may be a repository's name, and the hub answers."""
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push: {repository} is no name on the hub; USER/NAME is accepted")
    if not answers(constants.ENDPOINT):
        raise ConfigError(
            f"--push: {constants.ENDPOINT} cannot be reached; without --push, --format hub writes "
            "the same files here"
        )


def push(repository: str, files: Sequence[Path], private: bool = False) -> None:
    """Put the files into a repository in one commit; it is made if need be, `private` or not.

    Raises `ConfigError`, one line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with refused(
        f"--push: {repository} on {api.endpoint}",
        "a token that may write there is accepted, in HF_TOKEN or from `hf auth login`; the files "
        f"are complete in {files[0].parent}",
    ):
        api.create_repo(repository, exist_ok=True, private=private or None)
        added = [CommitOperationAdd(file.name, file) for file in files]
        api.create_commit(repository, added, commit_message="Weights and card of ddp-ssl export")
