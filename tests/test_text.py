"""Users' text is taken as given, and no text ends in a traceback."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

import ddp_ssl
from ddp_ssl.config import ConfigError, read_yaml, reference
from ddp_ssl.config.schema import Config
from ddp_ssl.config.text import flow, parse
from ddp_ssl.evals.settings import EvaluateConfig, load_as
from ddp_ssl.run.configure import load
from ddp_ssl.submit import sweep
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.text import one_line

# Each is something else for some reader of YAML.
LOOKALIKES = (
    "007", "1.10", "7e12345", "1e5", "runs/a #1", "2024-11-29", "2024-13-45", "0x1F", "1_000",
    "yes", "true", "True", "NULL", "Null", ".inf", ".nan", "12:30:45", "[a", "{b}", "a: b", "- c",
    "&d", "*e", "!f", "|", ">", "%g", "@h", "`i", "'j'", '"k"', " l", "m ", "=", "<<", "?", "-",
    "\u00e9\u4e2d", "\udce9", "n\to", "p\nq", "r\x1bs", "\\t", "9" * 200, "0b", "0o17", "008",
    "+.5", "1,000", "off",
)  # fmt: skip


def written_and_read(text: str, key: str, tmp_path: Path) -> tuple[Any, Any]:
    """The value of `key=text` on a command line, and after the config was written and read."""
    section, name = key.split(".")
    resolved = load([f"{key}={text}"])
    file = tmp_path / "config.yaml"
    file.write_text(resolved.to_yaml())
    again = load([str(file)]).config
    assert again.model_dump() == resolved.config.model_dump()
    values = (getattr(config, section) for config in (resolved.config, again))
    first, second = (getattr(section, name) for section in values)
    return first, second


@pytest.mark.parametrize("key", ["run.dir", "data.skip", "checkpoint.best"])
def test_a_text_is_taken_as_given_and_written_so_that_it_reads_back(
    key: str, tmp_path: Path
) -> None:
    draw = random.Random(key)
    alphabet = "0123456789abcenulEN.:+-_ #'\"[]{},&*!|>%@`?=\\/\t\n\u00fc\x07"
    drawn = ["".join(draw.choices(alphabet, k=draw.randint(2, 12))) for _ in range(15)]
    for text in [*LOOKALIKES, *drawn]:
        assert written_and_read(text, key, tmp_path) == (text, text)


def test_files_take_text_as_given_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text in (
        "007",
        "1.10",
        "7e12345",
        "2024-11-29",
        "2024-13-45",
        "0x1F",
        "off",
        "true",
        "1e5",
    ):
        file.write_text(f"run: {{dir: {text}}}\ndata: {{skip: {text}  # a comment\n}}\n")
        config = load([str(file)]).config
        assert (config.run.dir, config.data.skip) == (text, text)
        tree = read_yaml(file, EvaluateConfig)
        assert tree["run"]["dir"] == text
    file.write_text("run: {dir: null, resume: '007'}\ndata: {skip: , root: 'null'}\n")
    config = load([str(file)]).config
    assert (config.run.dir, config.run.resume) == (None, "007")
    assert (config.data.skip, config.data.root) == (None, "null")


def test_texts_in_lists_and_of_methods_from_outside_are_taken_as_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown recipe '007'"):
        load(["data.views=[{recipe: 007, count: 2}]"])
    with pytest.raises(ConfigError, match="unknown recipe '1e5'"):
        load(["data.views.0.recipe=1e5"])
    name = f"{__name__.rpartition('.')[0]}.outside:WithText"
    assert load([f"method.name={name}", "method.tag=1.10"]).config.method.tag == "1.10"
    file = tmp_path / "c.yaml"
    file.write_text(f"method: {{name: '{name}', tag: 1.10}}")
    assert load([str(file)]).config.method.tag == "1.10"
    evaluation, _ = load_as(EvaluateConfig, ["run.name=007", "model.prefix=1.", "run.dir=~/x"])
    assert (evaluation.run.name, evaluation.model.prefix) == ("007", "1.")
    assert evaluation.run.dir == os.path.expanduser("~/x")


@pytest.mark.parametrize("text", ["null", ""])
def test_a_bare_null_unsets(text: str) -> None:
    assert load(["run.dir=x", f"run.dir={text}", f"checkpoint.best={text}"]).config.run.dir is None


def test_every_path_has_its_tilde_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ("run.dir", "run.resume", "run.init_from", "data.root", "data.files", "data.val_files",
             "data.skip", "data.stage")  # fmt: skip
    for key in paths:
        section, name = key.split(".")
        config = load([f"{key}=~/x/~", "data.name=digits"]).config
        assert getattr(getattr(config, section), name) == "/home/me/x/~"
    known = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key, item in field.annotation.model_fields.items()  # type: ignore[union-attr]
        if "path" in str(item.metadata) + str(item.annotation)
    }
    assert known == set(paths)


def test_quotes_keep_a_comma_in_a_sweep_and_are_no_part_of_the_text() -> None:
    assert sweep(["data.root='/a,b',/c", "data.skip='d'"]) == [
        ["data.root=/a,b", "data.skip='d'"], ["data.root=/c", "data.skip='d'"]
    ]  # fmt: skip


def test_numbers_lists_and_words_of_other_keys() -> None:
    text = (
        "{a: 1e-4, b: off, c: true, d: 3e2, e: 1_000, f: .5, g: -.inf, h: 0x1F, i: 1., j: -2.5e-3, "
        "k: 007, l: ~, m: +5, n: 20:23, o: 2024-11-29, p: [1, [x]], 3: '4'}"
    )
    assert parse(text) == {
        "a": 1e-4, "b": "off", "c": True, "d": 300.0, "e": 1000, "f": 0.5, "g": -float("inf"),
        "h": 31, "i": 1.0, "j": -2.5e-3, "k": 7, "l": None, "m": 5, "n": "20:23",
        "o": "2024-11-29", "p": [1, ["x"]], "3": "4",
    }  # fmt: skip


@pytest.mark.parametrize("value", [*LOOKALIKES, "null", "~", "", 7, -1.5e-300, True, None, [], {}])
def test_a_written_value_reads_back_with_its_type(value: Any) -> None:
    text = flow([value])
    assert "\n" not in text
    assert parse(text) == [value]
    assert type(parse(text)[0]) is type(value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    BOMB: "more than 10000 values",
    "a: &a [*a]": "inside of itself",
    "a: &a {b: {c: *a}}": "inside of itself",
    "run: " + "[" * 200 + "]" * 200: "more than 32 levels",
    "run:\n" + "".join(" " * i + "a:\n" for i in range(1, 300)): "more than 32 levels",
    "run: " + "{a: " * 100_000: "more than 32 levels",
    "? [1, 2]\n: 3": "is no key",
    "run: {? {a: 1} : 2}": "is no key",
    "run: {dir: !!binary x}": "the tag tag:yaml.org,2002:binary is not accepted",
    "optim: {lr: !!float x}": "is not accepted",
    "run: !!python/object/apply:os.system [ls]": "is not accepted",
    "run: {dir: \"\\UFFFFFFFF\"}": "not valid YAML",
    "run: {dir: \"\\uD800\"}": "run.dir",
    "run: {dir: \"\\0\"}": "run.dir: a path cannot hold a zero byte",
    "%YAML " + "9" * 5000 + "\n--- 1": "not valid YAML",
    "optim: {epochs: " + "9" * 5000 + "}": "optim.epochs",
    "optim: {lr: " + "9" * 5000 + "}": "optim.lr",
    "optim: {epochs: 0x" + "f" * 5000 + "}": "optim.epochs",
    "run: {seed: 2024-13-45}": "run.seed: input should be a valid integer",
    "run: {seed: 1:2:3}": "run.seed: input should be a valid integer",
    "run: {seed: 0b_}": "run.seed: input should be a valid integer",
    "run: {<<: {seed: 1}}": "run.<<: unknown key",
    "2024-01-01: {a: b}": "2024-01-01: unknown section",
    "1: 2": "1: unknown section",
    "null: {}": "null: unknown section",
    "a: 1\n" * 300_000: "longer than 1000000 bytes",
    "--- a\n--- b": "not valid YAML",
    "data: {views: [null]}": "data.views.0",
    "data: {views: {0: {size: 8}}}": "data.views",
    "data: [1]": "data: input should be",
    "method: {name: [1]}": "method.name",
    "method: 3": "method: expected keys",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_file_is_refused_in_one_line_and_at_once(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load([str(file)])
    assert time.process_time() - start < 2
    assert HOSTILE[text] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def refusal(words: list[str]) -> str:
    """The error, if there is one; any other than a `ConfigError` fails the test."""
    try:
        load(words)
    except ConfigError as error:
        return str(error)
    return ""


def test_no_argument_ends_in_another_error_than_one_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    keys = ["run.dir", "optim.lr", "data.views", "data.views.0.size", "model.backbone_args", "x",
            "data.views." + "9" * 5000, "data.views.\u00b2", "optim.betas.0", "a.b.c.d", "..",
            "method.name", "model.projector", "run", ""]  # fmt: skip
    parts = ["[", "]", "{", "}", ":", " ", ",", "&a", "*a", "!!int", "!!x", "'", '"', "\\x", "\n",
             "-", "9" * 400, "0x", "1e999", ".nan", "2024-02-30", "a" * 300, "/" * 5000, "\udcff",
             "|", "#", "null", "<<", "0b_", "%", "@", "?", "\x1b[2J"]  # fmt: skip
    file, refused = tmp_path / "c.yaml", 0
    for _ in range(200):
        words = [
            draw.choice(keys) + draw.choice(["=", "", "=="]) + "".join(draw.choices(parts, k=3))
            for _ in range(draw.randint(1, 2))
        ]
        if draw.random() < 0.3:
            file.write_text(draw.choice(list(HOSTILE)) if draw.random() < 0.3 else "data: [1]")
            words.insert(0, str(file))
        error = refusal(words)
        refused += bool(error)
        assert error.isprintable()
    assert refused > 100


@pytest.mark.parametrize("length", [250, 255, 256, 400, 5000, 100_000])
def test_an_argument_of_any_length(length: int) -> None:
    for word in ("x" * length, "data.root=/x/" + "y" * length, "data.name=" + "z" * length):
        assert refusal([word]).isprintable()
    assert bool(refusal(["run.dir=/x/" + "y" * length])) is (length > 255)


EXTREMES = ("1e300", "-1e300", "1e-300", "1e31", "1e-31", "9" * 50, "-" + "9" * 40, "1e999",
            ".nan", "0x" + "f" * 40)  # fmt: skip


def numeric_keys() -> list[str]:
    """The keys of one number, and items of ranges."""
    rows = reference()
    words = ("int", "float", "Side", "Positive")
    keys = [key for key, kind, _, _ in rows if kind.split(" | ")[0] in words]
    keys = [key.replace("data.views.N", "data.views.0") for key in keys]
    return [key for key in keys if not key.startswith("method.")] + ["method.temperature"]


def test_no_number_is_too_large_or_too_small_without_a_word() -> None:
    keys = numeric_keys()
    assert len(keys) > 50
    assert refusal(["eval.knn_bank=2147483648"]).startswith("eval.knn_bank: ")
    assert {"run.timeout_s", "data.views.0.hue", "data.val_resize", "optim.lr"} <= set(keys)
    for key in keys:
        for value in EXTREMES:
            assert refusal([f"{key}={value}"]).startswith(f"{key}: "), (key, value)


@pytest.mark.parametrize(
    "argument",
    ["run.timeout_s=1e10", "data.val_resize=100000", "data.views.0.size=5000", "run.max_hours=1e9",
     "data.views.0.blur_sigma=[1e6, 1e6]", "data.std=[1e-40, 1, 1]", "optim.betas=[1e-300, 0.9]",
     "model.projector=[2147483648]", "method.temperature=0.001", "data.preallocate=[1e10, 1]"],
)  # fmt: skip
def test_a_bound_is_named(argument: str) -> None:
    assert refusal([argument]).startswith(argument.partition("=")[0])


def test_a_range_may_be_one_number() -> None:
    (views,) = load(["data.views.0.blur_sigma=[.5, .5]"]).config.data.views
    assert views.blur_sigma == (0.5, 0.5)


def test_every_path_on_a_command_line_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert path_of("~/x.npz") == Path("/home/ada/x.npz")
    assert path_of("a~/x") == Path("a~/x")
    package = Path(ddp_ssl.__file__).parent
    assert [p for p in package.rglob("*.py") if "type=Path" in p.read_text()] == []


def test_a_long_line_keeps_its_end() -> None:
    """Where libraries write the cause."""
    assert one_line("NCCL failed:\n out of memory", 30) == "NCCL failed: out of memory"
    cut = one_line(f"NCCL failed: {'x' * 500}\nLast error: no route", 60)
    assert cut.startswith("NCCL failed: ")
    assert cut.endswith(" Last error: no route")
    assert len(cut) <= 60
