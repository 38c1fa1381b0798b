"""The loggers of `log.to`: each row once and in order, whatever happens to the run or to them."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_ssl.checkpoint import store
from ddp_ssl.config import ConfigError
from ddp_ssl.config.schema import LOGGERS
from ddp_ssl.evals.settings import config_of_run
from ddp_ssl.logs.loggers import BUILT_IN, Given, load_loggers
from ddp_ssl.logs.writer import MetricsWriter
from ddp_ssl.resume import arguments_of
from ddp_ssl.run import folder as run_folder
from ddp_ssl.run.configure import load
from tests.outside_loggers import LINES
from tests.runs import BARE, arguments, call, complaint, train

ROOT = Path(__file__).parent.parent
HERE = f"{__name__.rpartition('.')[0]}.outside_loggers"
CONFIG = {"optim": {"lr": 0.4}}
Saved = tuple[int, int, int]  # step, offset, crc: what a checkpoint keeps


def start(folder: Path, saved: Saved | None = None, to: str = f"{HERE}:Lines") -> MetricsWriter:
    step, offset, crc = saved or (None, 0, None)
    return MetricsWriter(
        folder, resumed_step=step, offset=offset, crc=crc, loggers=load_loggers([to]), config=CONFIG
    )


def write(writer: MetricsWriter, steps: range, value: float = 0.0) -> None:
    """Rows of training, and of a validation at every third step."""
    for step in steps:
        writer.scalars({"step": step, "epoch": 1, "train/loss": value + step})
        if step % 3 == 0:
            writer.scalars({"step": step, "epoch": 1, "eval/knn_top1": value + step})


def saved(writer: MetricsWriter, step: int) -> Saved:
    return step, writer.offset(), writer.crc


def given(folder: Path) -> list[Any]:
    """What `Lines` got: steps of training as numbers, of validations negative, starts as texts."""
    found: list[Any] = []
    for line in (folder / LINES).read_text().splitlines():
        row = json.loads(line)
        if "start" in row:
            found.append(f"start {row['start']}")
        else:
            found.append(row["step"] if "train/loss" in row else -row["step"])
    return found


def rows_of(given: list[Any]) -> list[int]:
    return [each for each in given if not isinstance(each, str)]


# --- the config ------------------------------------------------------------------------------


def test_the_old_key_still_loads(tmp_path: Path) -> None:
    assert load([]).config.log.to == ["tensorboard"]
    old = tmp_path / "config.yaml"
    old.write_text("log: {every_steps: 3, tensorboard: false}\n")
    assert load([str(old)]).config.log.model_dump() == {"every_steps": 3, "to": []}
    assert load([str(old)]).origins["log.to"] == str(old)
    assert load([str(old), "log.to=[wandb, a.b:C]"]).config.log.to == ["wandb", "a.b:C"]
    assert load([str(old), "log.tensorboard=true"]).config.log.to == ["tensorboard"]
    assert load(["log.tensorboard=off"]).config.log.to == []
    assert load(["log.tensorboard=false", "log.to=[wandb]"]).config.log.to == ["wandb"]
    assert load(["log.to=[wandb]", "log.tensorboard=false"]).config.log.to == []
    old.write_text("log: {to: [wandb], tensorboard: false}\n")
    with pytest.raises(ConfigError, match=r"^log.tensorboard: .* one of them is accepted$"):
        load([str(old)])
    assert load(["log.to=[]"]).config.log.to == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["log.tensorboard=3"], r"log.tensorboard: expected true or false, got 3; log.to=\[t"),
        (["log.tensorboard="], "log.tensorboard: expected true or false, got null"),
        (["log.to=wandb"], r"log.to: .*a list is written 'log.to=\[wandb\]'"),
        (["log.to=[wand]"], "unknown logger 'wand'; did you mean wandb.; accepted: tens"),
        (["log.to=[a:b:C]"], "unknown logger 'a:b:C'"),
        (["log.to=[wandb, wandb]"], "wandb is given twice"),
        (["log.wandb=true"], "log.wandb: unknown key"),
        (["report_to=wandb"], "did you mean log.to"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(words)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Logs", "^log.to: cannot import no_such_module:Logs: No module named"),
        (f"{HERE}:Missing", "^log.to: cannot import .*AttributeError.*Missing"),
        (f"{HERE}:LINES", f"^log.to: {HERE}:LINES is not a subclass of ddp_ssl.logs.loggers.L"),
    ],
)
def test_what_cannot_be_imported_is_one_line(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_loggers([name])


def test_a_missing_package_is_one_line_at_the_start(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "ddp_ssl.logs.wandb", raising=False)
    code, said = complaint(arguments(photos, tmp_path / "run", "log.to=[wandb]"))
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert code == 2
    assert line.startswith("ddp_ssl: error: log.to: cannot import wandb: ")
    assert line.endswith("; pip install 'ddp_ssl[wandb]' is accepted")
    assert not (tmp_path / "run").exists()


def test_somebody_elses_logger_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.yaml").write_text("log: {to: [tensorboard, theirs:Logs]}\n")
    assert config_of_run(tmp_path).log.to == ["tensorboard", "theirs:Logs"]  # evaluate, export
    place = str(tmp_path)
    with pytest.raises(ConfigError, match=r"^log.to: theirs:Logs would be .* or --trust is accep"):
        arguments_of([place])
    for consent in ("log.to=[theirs:Logs]", "log.to=[]", "log.tensorboard=true"):
        assert consent in arguments_of([place, consent])
    assert f"run.dir={place}" in arguments_of([place, "--trust"])
    assert "theirs" not in sys.modules


# --- each row once and in order --------------------------------------------------------------


def test_each_row_is_given_once_and_in_order_after_three_restarts(tmp_path: Path) -> None:
    """The last step is cut: its training row was given, its validation row was not."""
    writer = start(tmp_path)
    write(writer, range(1, 5))
    at_4 = saved(writer, 4)
    write(writer, range(5, 9))
    writer.scalars({"step": 9, "epoch": 1, "train/loss": 9.0})
    del writer  # killed
    writer = start(tmp_path, at_4)
    write(writer, range(5, 7), 100.0)  # killed again, earlier than before
    del writer
    writer = start(tmp_path, at_4)
    write(writer, range(5, 8), 200.0)
    at_7 = saved(writer, 7)
    write(writer, range(8, 11), 200.0)
    writer.close()
    writer = start(tmp_path, at_7)
    write(writer, range(8, 13), 300.0)
    writer.close()
    rows = [1, 2, 3, -3, 4, 5, 6, -6, 7, 8, 9, -9, 10, 11, 12, -12]
    found = given(tmp_path)
    assert rows_of(found) == rows
    assert [x for x in found if x not in rows] == [
        "start None", "start 9", "start 9", "start 10",
    ]  # fmt: skip
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [abs(row) for row in rows]


def test_a_run_that_died_before_its_first_checkpoint_goes_on(tmp_path: Path) -> None:
    write(start(tmp_path), range(1, 4))
    write(start(tmp_path), range(1, 3))
    write(start(tmp_path), range(1, 6))
    assert given(tmp_path) == [
        "start None", 1, 2, 3, -3, "start 3", "start 3", 4, 5,
    ]  # fmt: skip


def test_a_stopped_run_goes_on_after_its_last_row(tmp_path: Path) -> None:
    writer = start(tmp_path)
    write(writer, range(1, 4))
    at_3 = saved(writer, 3)
    writer.close()
    write(start(tmp_path, at_3), range(4, 6))
    assert given(tmp_path) == ["start None", 1, 2, 3, -3, "start 3", 4, 5]
    assert not (tmp_path / "given.json").exists()


def test_a_logger_that_rewinds_is_given_rows_again(tmp_path: Path) -> None:
    to = f"{HERE}:Rewinding"
    writer = start(tmp_path, to=to)
    write(writer, range(1, 3))
    at_2 = saved(writer, 2)
    write(writer, range(3, 6))
    write(start(tmp_path, at_2, to), range(3, 5))
    assert given(tmp_path) == ["start None", 1, 2, 3, -3, 4, 5, "start 2", 3, -3, 4]
    assert not (tmp_path / "given.json").exists()


def test_what_was_given_is_read_from_damaged_files_too(tmp_path: Path) -> None:
    write(start(tmp_path), range(1, 3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\0\0\n{"step": 3, "ep')
    (tmp_path / "given.json").write_text('{"step": "x"')
    write(start(tmp_path), range(1, 4))
    assert rows_of(given(tmp_path)) == [1, 2, 3, -3]


def test_other_settings_without_a_checkpoint_begin_anew(tmp_path: Path) -> None:
    """Else a logger would lack the first rows of the new experiment."""
    (tmp_path / "checkpoints").mkdir()
    first = load(["optim.lr=0.1", "eval.every=3"]).to_yaml()
    run_folder.write_about(tmp_path, first, ["n1"], 0)
    write(start(tmp_path), range(1, 3))
    run_folder.write_about(tmp_path, first.replace("every: 3", "every: 5"), ["n1"], 0)
    write(start(tmp_path), range(1, 4))
    run_folder.write_about(tmp_path, load(["optim.lr=0.2"]).to_yaml(), ["n1"], 0)
    write(start(tmp_path), range(1, 3))
    assert given(tmp_path) == ["start None", 1, 2, "start 2", 3, -3, "start None", 1, 2]


def test_pictures_and_histograms_of_steps_before_are_left_out() -> None:
    last = Given(6, frozenset({"train/loss"}))
    assert last.has(5, "anything")
    assert last.has(6, "train/loss", "perf/save_ms")
    assert not last.has(6, "eval/knn_top1")
    assert not last.has(7, "train/loss")
    assert not Given().has(0, "data/views")


def test_a_whole_run_gives_each_row_once(photos: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint and between two, and stopped."""
    to = f"log.to=[tensorboard, {HERE}:Lines]"
    args = arguments(photos, tmp_path / "run", *BARE, to, "run.resume=auto")
    for death in (1, 5):
        assert train(args, death) == "killed"
    assert train(args, stop_at=7) == 0
    assert train(args) == 0
    assert f"'{to}'" in (tmp_path / "run/train.log").read_text()  # in the command that goes on
    lines = [json.loads(x) for x in (tmp_path / "run" / LINES).read_text().splitlines()]
    rows = [line for line in lines if "step" in line]
    kept = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    def names(rows: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
        return [(row["step"], [n for n in row if not n.startswith("perf/")]) for row in rows]

    assert names(rows) == names(kept)
    assert len({line["lr"] for line in lines if "start" in line}) == 1
    assert len(list((tmp_path / "run").glob("events.out.*"))) == 4
    assert len(store.find(tmp_path / "run")) == 2


# --- a logger that fails ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["start", "row", "flush", "close"])
def test_a_logger_that_raises_is_dropped(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAISES_AT", where)
    both = load_loggers([f"{HERE}:Raises", f"{HERE}:Lines"])
    writer = MetricsWriter(tmp_path, resumed_step=None, offset=0, loggers=both, config=CONFIG)
    write(writer, range(1, 3))
    writer.offset()
    write(writer, range(3, 6))
    writer.close()
    assert rows_of(given(tmp_path)) == [1, 2, 3, -3, 4, 5]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.match(f"log.to: {HERE}:Raises ends here, the run goes on .*planted", warning)
    assert "\n" not in warning


def test_ctrl_c_within_a_logger_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    kinds = load_loggers([f"{HERE}:Raises"])
    writer = MetricsWriter(tmp_path, resumed_step=None, offset=0, loggers=kinds)
    monkeypatch.setattr(kinds[f"{HERE}:Raises"], "row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(writer, range(1, 2))


# --- the page --------------------------------------------------------------------------------


def test_the_class_on_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    (code,) = re.findall(r"```python\n(from ddp_ssl.logs.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_loggers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (name,) = set(re.findall(r"my_loggers:\w+", text))
    writer = start(tmp_path, to=name)
    write(writer, range(1, 3))
    at_2 = saved(writer, 2)
    write(writer, range(3, 5))
    write(start(tmp_path, at_2, name), range(3, 6))
    lines = (tmp_path / "losses.txt").read_text().splitlines()
    assert lines == ["1 1.0", "2 2.0", "3 3.0", "4 4.0", "5 5.0"]


# --- Weights & Biases ------------------------------------------------------------------------


class StandIn(types.ModuleType):
    """As much of the module `wandb` as the logger uses; `calls` has what it was told."""

    def __init__(self, mode: str, key: bool) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[Any, ...]] = []
        self.mode, self.key, self.starts = mode, key, 0

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.key

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Image(self, image: Any) -> str:
        return f"image {image.shape}"

    def Histogram(self, values: Any) -> str:
        return f"histogram {values.shape}"

    def init(self, **settings: Any) -> Any:
        self.starts += 1
        name = settings["id"] or f"id-{self.starts}"
        at = f"20300101_00000{self.starts}"
        (Path(settings["dir"]) / f"wandb/offline-run-{at}-{name}").mkdir(parents=True)
        self.calls.append(("init", settings))
        return types.SimpleNamespace(
            log=lambda figures, step: self.calls.append((step, figures)),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


@pytest.fixture
def fresh_adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The adapter is imported anew, with the module that is there then."""
    monkeypatch.delitem(sys.modules, "ddp_ssl.logs.wandb", raising=False)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield
    sys.modules.pop("ddp_ssl.logs.wandb", None)


@pytest.mark.usefixtures("fresh_adapter")
def test_wandb_is_one_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StandIn("online", key=True)
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = tmp_path / "my run"
    folder.mkdir()
    writer = start(folder, to="wandb")
    writer.loggers.image("data/views", np.zeros((4, 6, 3), np.uint8), 0)
    write(writer, range(1, 4))
    at_3 = saved(writer, 3)
    writer.loggers.histogram("rep/spectrum_r", np.zeros(5), 3)
    write(writer, range(4, 6))
    try:
        raise RuntimeError
    except RuntimeError:
        writer.close()  # as `training/lifecycle.py` does
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    writer = start(folder, at_3, to="wandb")
    write(writer, range(4, 7))
    writer.close()
    inits = [call[1] for call in module.calls if call[0] == "init"]
    assert [(c["id"], c["resume"], c["project"]) for c in inits] == [
        (None, None, "ddp_ssl"), ("id-1", "allow", "mine"),
    ]  # fmt: skip
    assert {(c["dir"], c["name"]) for c in inits} == {(str(folder), "my run")}
    assert inits[0]["config"] == CONFIG
    assert [call for call in module.calls if call[0] != "init"] == [
        (0, {"data/views": "image (4, 6, 3)"}),
        *[(step, {"epoch": 1, "train/loss": step}) for step in (1, 2, 3)],
        (3, {"epoch": 1, "eval/knn_top1": 3}),
        (3, {"rep/spectrum_r": "histogram (5,)"}),
        *[(step, {"epoch": 1, "train/loss": step}) for step in (4, 5)],
        ("finish", 1),
        (6, {"epoch": 1, "train/loss": 6}),
        (6, {"epoch": 1, "eval/knn_top1": 6}),
        ("finish", 0),
    ]


@pytest.mark.usefixtures("fresh_adapter")
@pytest.mark.parametrize(("mode", "said"), [("online", 1), ("offline", 0)])
def test_wandb_never_asks_for_a_key(
    mode: str, said: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    module = StandIn(mode, key=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    writer = start(tmp_path, to="wandb")
    write(writer, range(1, 3))
    writer.close()
    assert caplog.text.count("log.to: wandb ends here, the run goes on without it: no API") == said
    assert len(module.calls) == (0 if said else 4)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows in a file of W&B's: blocks of 32 KiB with parts of records, after LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                values = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items}
                yield parsed.history.step.num, values


def test_wandb_offline(photos: Path, tmp_path: Path) -> None:
    """Its files after a crash and a restart: each row once, and no key in any file."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'ddp_ssl[wandb]'")
    key = "0123456789" * 4
    run = tmp_path / "run"
    args = arguments(photos, run, *BARE, "log.to=[wandb]", "run.resume=auto")
    code = f"from tests.runs import train; train({args!r}, 5)"
    settings = {"WANDB_MODE": "offline", "WANDB_API_KEY": key, "WANDB_PROJECT": "ssl"}
    killed = call(sys.executable, "-c", code, **settings)
    assert killed.returncode == 0, killed.stderr
    assert "warning: log.to" not in killed.stderr
    done = call(sys.executable, "-m", "ddp_ssl.train", *args, **settings)
    assert done.returncode == 0, done.stderr
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "one run of W&B's"
    rows = [row for file in files for row in history(file)]
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps)) == list(range(10))
    kept: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept.setdefault(row.pop("step"), {}).update(row)
    for step, values in rows:
        more = ("_", "perf/", "rep/spectrum_", "data/views")  # their own, pictures, histograms
        names = {name for name in values if not name.startswith(more)}
        assert names == {name for name in kept[step] if not name.startswith("perf/")}
        assert values.get("train/loss") == kept[step].get("train/loss")
    everything = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in everything if key.encode() in path.read_bytes()]
    assert key not in killed.stdout + killed.stderr + done.stdout + done.stderr


def test_the_end_is_recorded_before_a_logger_takes_its_time(photos: Path, tmp_path: Path) -> None:
    """A launcher that kills during an upload must find how the run ended."""
    args = arguments(photos, tmp_path / "run", *BARE, "optim.epochs=1", f"log.to=[{HERE}:Slow]")
    assert train(args) == 0
    assert (tmp_path / "run" / "at_close.txt").read_text() == "done"


def test_the_config_knows_the_loggers_that_have_a_name() -> None:
    assert set(LOGGERS) == set(BUILT_IN)
