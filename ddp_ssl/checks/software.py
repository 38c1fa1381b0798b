"""Versions and environment variables."""

import os
import re
import socket
from pathlib import Path
from typing import Any

from ddp_ssl.checks.base import Check, Context, Finding, Findings, by_value, fail, ok, warn
from ddp_ssl.driver import Driver, find_driver, install_command
from ddp_ssl.errors import ConfigError
from ddp_ssl.logs.loggers import load_loggers
from ddp_ssl.run import environment

NEEDED = ("torch", "torchvision", "timm", "nvidia-dali")


def look_at_versions(ctx: Context, before: list[Any]) -> dict[str, str]:
    """Installed versions, and the CUDA version that the GPU's driver supports."""
    here = environment.environment()
    found = {name.lower(): version for name, version in here["packages"].items()}
    found |= {"python": here["python"], "commit": here["git_commit"] or "none"}
    found["cuda"] = here["cuda"] or "none"
    driver = find_driver()
    found["driver"] = "none" if driver is None else driver.cuda
    return found


def judge_versions(ctx: Context, facts: list[dict[str, str]]) -> Findings:
    mine = facts[0]
    missing = [n for n in NEEDED if not any(found.startswith(n) for found in mine)]
    if missing:
        yield fail(f"{', '.join(missing)} not installed", install_command(find_driver()))
    differing = False
    for name in sorted(set().union(*facts)):
        values = by_value([fact.get(name, "none") for fact in facts])
        if len(values) > 1:
            differing = True
            parts = [f"{value} on {ctx.who(ranks)}" for value, ranks in values.items()]
            yield fail(f"{name} differs: {'; '.join(parts)}", "one environment for all processes")
    yield from _cuda_matches(ctx, mine)
    if not missing and not differing:
        dali = sorted(name for name in mine if name.startswith("nvidia-dali-"))
        names = ("python", "torch", "torchvision", "timm", *dali, "ddp_ssl")
        shown = [f"{name} {mine.get(name, 'not installed')}" for name in names]
        commit = re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", mine["commit"])
        shown.append(f"commit {commit}")
        yield ok(", ".join(shown))


def _cuda_matches(ctx: Context, mine: dict[str, str]) -> Findings:
    """Whether the driver is new enough for torch's and DALI's CUDA."""
    if ctx.config.run.device == "cpu" or mine["driver"] == "none":
        return
    driver = int(mine["driver"].partition(".")[0])
    built = {"torch": mine["cuda"].partition(".")[0]}
    built |= {n: n.removeprefix("nvidia-dali-cuda")[:2] for n in mine if "dali-cuda" in n}
    for name, major in built.items():
        if name == "torch" and major == "none":
            yield fail("torch is built without CUDA", install_command(Driver("", mine["driver"])))
        elif major.isdigit() and int(major) > driver:
            yield fail(
                f"the driver supports CUDA {mine['driver']}, {name} is built for {major}",
                f"{install_command(Driver('', mine['driver']))}, or a newer driver",
            )


# Name, pattern of the values that cause trouble, reason, remedy.
HARMFUL = (
    ("NCCL_P2P_DISABLE", "1", "GPUs do not talk directly", "unset it"),
    ("NCCL_SHM_DISABLE", "1", "processes of a host talk through sockets", "unset it"),
    ("NCCL_IB_DISABLE", "1", "InfiniBand is not used", "unset it where there is InfiniBand"),
    ("NCCL_DEBUG", "TRACE|trace", "every call is logged", "NCCL_DEBUG=WARN"),
    ("NCCL_BLOCKING_WAIT|TORCH_NCCL_BLOCKING_WAIT", "1", "the host waits in every collective",
     "unset it"),
    ("NCCL_ASYNC_ERROR_HANDLING|TORCH_NCCL_ASYNC_ERROR_HANDLING", "0",
     "a dead process leaves the others waiting for ever", "unset it"),
    ("CUDA_LAUNCH_BLOCKING", "1", "the host waits for every kernel", "unset it"),
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL|detail", "every collective is checked by another one",
     "TORCH_DISTRIBUTED_DEBUG=INFO"),
    ("CUDA_VISIBLE_DEVICES", "|-1|NoDevFiles", "it hides all GPUs",
     "unset it, or run.device=cpu"),
)  # fmt: skip
AFFINITY = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES")
NAMES = re.compile(r"(NCCL|TORCH_NCCL|GLOO|CUDA|OMP|TORCH_DISTRIBUTED)_\w+")
OWN = ("CUDA_VISIBLE_DEVICES",)  # may differ between processes


def look_at_variables(ctx: Context, before: list[Any]) -> dict[str, Any]:
    """Environment variables of torch, NCCL and gloo, and this host's network interfaces."""
    names = {name for name in os.environ if NAMES.fullmatch(name)} | set(AFFINITY)
    variables = {name: os.environ[name] for name in sorted(names) if name in os.environ}
    return {"variables": variables, "interfaces": [name for _, name in socket.if_nameindex()]}


def judge_variables(ctx: Context, facts: list[dict[str, Any]]) -> Findings:
    found: list[Finding] = []
    variables = [fact["variables"] for fact in facts]
    for names, value, reason, remedy in HARMFUL:
        if "CUDA" in names and ctx.config.run.device == "cpu":
            continue
        for name in names.split("|"):
            ranks = [r for r, v in enumerate(variables) if v.get(name) in value.split("|")]
            if ranks:
                text = f"{name}={variables[ranks[0]][name]} on {ctx.who(ranks)}: {reason}"
                found.append(warn(text, remedy))
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        lost = [
            rank
            for rank, fact in enumerate(facts)
            if not _interface_exists(fact["variables"].get(name, ""), fact["interfaces"])
        ]
        if lost:
            there = ", ".join(facts[lost[0]]["interfaces"])
            text = f"{name}={variables[lost[0]][name]} is no interface of {ctx.who(lost)}"
            found.append(fail(text, f"one of {there}, or unset it"))
    for name in AFFINITY:
        ranks = [r for r, v in enumerate(variables) if v.get(name) not in (None, "false", "FALSE")]
        if len(ranks) > len(set(ctx.hosts)):
            text = f"{name} is set: the processes of a host may be bound to the same cores"
            found.append(warn(text, "unset it"))
    for name in sorted(set().union(*variables) - set(OWN)):
        values = by_value([v.get(name, "unset") for v in variables])
        if len(values) > 1:
            parts = [f"{value} on {ctx.who(ranks)}" for value, ranks in values.items()]
            found.append(warn(f"{name} differs: {'; '.join(parts)}", "the same for all processes"))
    yield from found
    if not found:
        shown = [f"{name}={value}" for name, value in variables[0].items()]
        yield ok(", ".join(shown) or "none that change how processes talk or compute")


def _interface_exists(wanted: str, there: list[str]) -> bool:
    """Whether an interface matches, by NCCL's rules: prefixes, `=` exact names, `^` all but."""
    if not wanted or wanted.startswith("^"):
        return True
    exact = wanted.startswith("=")
    names = wanted.lstrip("=").split(",")
    return any(t == name if exact else t.startswith(name) for t in there for name in names)


def look_at_loggers(ctx: Context, before: list[Any]) -> list[str]:
    """What is wrong with the loggers on rank 0, which writes."""
    problems = []
    for name in ctx.config.log.to if ctx.world.is_main else ():
        try:
            load_loggers([name])
        except ConfigError as error:
            problems.append(str(error))
    return problems


def judge_loggers(ctx: Context, facts: list[list[str]]) -> Findings:
    names = ctx.config.log.to
    for problem in facts[0]:
        yield fail(problem, "install or mend it, or another log.to")
    if not facts[0]:
        where = ctx.folder.parent if ctx.folder else Path("runs")
        hint = f"; tensorboard --logdir {where}" if "tensorboard" in names else ""
        yield ok(f"metrics.jsonl{''.join(f', {name}' for name in names)}{hint}")


CHECKS = (
    Check("versions", (look_at_versions,), judge_versions),
    Check("variables", (look_at_variables,), judge_variables),
    Check("loggers", (look_at_loggers,), judge_loggers),
)
