"""What a mistyped word of a command line was meant to be, for the end of an error's line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

# Names that other tools use, by the key here. A name that ends in a key's own last part, such as
# `epochs`, needs no line.
OTHER_NAMES = {
    "run.dir": "output output_dir out out_dir save_dir log_dir logdir checkpoint_dir ckpt_dir"
    " default_root_dir exp_dir work_dir",
    "run.seed": "random_seed manual_seed",
    "run.device": "accelerator",
    "run.resume": "ckpt_path resume_from resume_from_checkpoint resume_from_ckpt",
    "run.init_from": "weights pretrained_weights init_weights finetune_from",
    "run.max_hours": "max_time",
    "method.name": "method algorithm ssl_method loss",
    "method.temperature": "temperature temp tau t",
    "method.momentum": "ema ema_decay ema_momentum base_tau moving_average_decay",
    "model.backbone": "model arch architecture encoder network model_name",
    "model.backbone_args": "pretrained",
    "model.projector": "proj_dim proj_hidden_dim proj_output_dim projection_dim out_dim hidden_dim"
    " projector_dim embedding_dim head",
    "model.batch_norm": "sync_bn sync_batchnorm syncbn",
    "model.compile": "torch_compile",
    "model.ema": "model_ema weight_ema weights_ema",
    "data.name": "dataset dataset_name data",
    "data.root": "data_dir data_path data_root train_dir train_path train_data_path dataset_path"
    " imagenet_dir input_dir",
    "data.batch_size": "batch_size batchsize batch bs train_batch_size global_batch_size"
    " per_device_batch_size per_device_train_batch_size",
    "data.threads": "num_workers workers n_workers num_threads dataloader_num_workers",
    "data.views.0.size": "img_size image_size input_size crop_size resolution",
    "data.views.0.count": "num_views n_views num_crops num_large_crops nmb_crops",
    "data.views.0.recipe": "augmentation augmentations aug transform transforms",
    "optim.lr": "learning_rate base_lr base_learning_rate init_lr peak_lr max_lr",
    "optim.name": "optim optimizer optimiser opt",
    "optim.epochs": "max_epochs num_epochs n_epochs num_train_epochs",
    "optim.warmup_epochs": "warmup warmup_steps warmup_ratio num_warmup_steps",
    "optim.final_lr_fraction": "min_lr eta_min lr_min final_lr",
    "optim.weight_decay": "wd decay l2",
    "optim.final_weight_decay": "weight_decay_end",
    "optim.layer_decay": "layerwise_decay layer_wise_decay llrd",
    "optim.momentum": "sgd_momentum",
    "optim.grad_clip": "gradient_clip_val gradient_clip clip_grad clip_grad_norm max_grad_norm",
    "optim.accumulate": "accumulate_grad_batches gradient_accumulation_steps",
    "optim.precision": "amp use_amp fp16 bf16 mixed_precision autocast use_fp16",
    "optim.lars_eta": "trust_coefficient eta_lars",
    "eval.every": "check_val_every_n_epoch val_every val_interval eval_freq validate_every",
    "eval.knn_k": "k n_neighbors num_neighbors",
    "checkpoint.every": "save_every save_freq save_interval checkpoint_frequency",
    "checkpoint.keep": "save_top_k",
    "log.to": "report_to logger loggers use_wandb enable_wandb",
    "log.every_steps": "log_every_n_steps print_freq log_freq log_interval log_every",
}
KEY_OF = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}


# Words that stand for the number of processes, which is the launcher's.
PROCESSES = {
    "gpus", "devices", "num_gpus", "n_gpus", "ngpus", "nproc", "nproc_per_node", "num_nodes",
    "nodes", "world_size",
}  # fmt: skip
LAUNCHER = "; torchrun --nproc_per_node N or srun starts the processes"


def similar_keys(dotted: str, known: Sequence[str]) -> list[str]:
    """The known keys that a wrong one may stand for; several if they are equally likely.

    First the only one with this last part, then the one that other tools call so, one of the same
    section that is almost the same, all with this last part, and any that is close.
    """
    section, _, last = dotted.lower().replace("-", "_").rpartition(".")
    another = KEY_OF.get(last, "")
    methods = [key for key in known if key.startswith("method.")]
    names = {key: key.rpartition(".")[2] for key in known}
    same = [key for key, name in names.items() if name == last]
    if len(same) == 1:
        return same
    if another in known or (another.startswith("method.") and methods == ["method.name"]):
        return [another]  # a method's own keys are not known yet where its name alone is
    siblings = {key: name for key, name in names.items() if key.rpartition(".")[0] == section}
    return (
        _closest(last, siblings, 0.8)
        or same
        or _closest(last, siblings, 0.5)
        or _closest(last, names, 0.7)
    )


def _closest(word: str, names: Mapping[str, str], cutoff: float) -> list[str]:
    """The key whose name is the closest, as a list; none below the cutoff."""
    found = difflib.get_close_matches(word, names.values(), 1, cutoff)
    return [key for key, name in names.items() if name in found][:1]


def did_you_mean(dotted: str, known: Sequence[str]) -> str:
    """`; did you mean A or B?` for a wrong key, or nothing."""
    if dotted.rpartition(".")[2] in PROCESSES:
        return LAUNCHER
    keys = similar_keys(dotted, known)
    return f"; did you mean {' or '.join(keys[:3])}?" if keys else ""


def misplaced_word(words: Sequence[str], at: int, known: Sequence[str]) -> str:
    """For a word that is neither a config nor `key=value`: how it should be written, or nothing.

    Knows a list that the shell has cut at its spaces, and a key without its `=`.
    """
    start = next((i for i in range(at, -1, -1) if "=" in words[i].strip("=")), None)
    if start is not None and _open(" ".join(words[start:at])):
        parts = (" ".join(words[start : end + 1]) for end in range(at, len(words)))
        whole = next((part for part in parts if not _open(part)), " ".join(words[start : at + 1]))
        return f"a value with spaces needs quotes: '{whole}'"
    if at and words[at - 1].endswith("=") and words[at - 1] != "=":
        return f"a value stands right after its `=`: {words[at - 1]}{words[at]}"
    found = re.fullmatch(r"-*([A-Za-z][\w.-]*)(?:[: ]+(\S*))?", words[at])
    if found is None:
        return ""
    name = found[1].replace("-", "_")
    if name in ("config", "cfg", "config_file", "config_name"):
        return "the config's name or path stands alone, without an option"
    if name in PROCESSES:
        return LAUNCHER.removeprefix("; ")
    keys = similar_keys(name, known)
    if not words[at].startswith("-") and "." not in name:  # perhaps a config's name
        keys = [key for key in keys if key == KEY_OF.get(name) or key.endswith(f".{name}")]
    following = [word for word in words[at + 1 : at + 3] if word not in ("=", ":")]
    value = found[2] or next((word for word in following[:1] if "=" not in word), "VALUE")
    told = " or ".join(f"{key}={value}" for key in keys[:3])
    return f"a key and its value are one word: {told}" if keys else ""


def _open(text: str) -> bool:
    """Whether the text opens a bracket that it does not close."""
    return any(text.count(a) > text.count(b) for a, b in ("[]", "{}", "()"))
