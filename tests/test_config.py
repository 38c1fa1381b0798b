"""The config: precedence, origins, one-line errors, no torch; every YAML in the tree."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from pydantic import ValidationError
from timm.models._registry import get_deprecated_models

from ddp_ssl.config import Config, ConfigError, backbones, check_world_size, read_yaml, reference
from ddp_ssl.config.backbones import check_backbone
from ddp_ssl.config.hints import OTHER_NAMES
from ddp_ssl.config.reader import known_keys
from ddp_ssl.config.schema import with_method
from ddp_ssl.methods._registry import builtin_methods, load_method
from ddp_ssl.run.configure import DIGITS, load
from ddp_ssl.run.identity import FREE_ON_RESUME, NOT_FREE, identity
from ddp_ssl.utils.launcher import cpu_share

ROOT = Path(__file__).parent.parent
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_precedence_and_origins(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "method: {name: vicreg}\noptim: {epochs: 7, momentum: 0.8}\n")
    resolved = load([file, "optim.momentum=0.7"])
    config, origins = resolved.config, resolved.origins
    assert config.optim.weight_decay == 1e-4
    assert "optim.weight_decay" not in origins
    assert (config.optim.lr, origins["optim.lr"]) == (0.3, "recipe of vicreg")
    assert (config.optim.epochs, origins["optim.epochs"]) == (7, file)
    assert (config.optim.momentum, origins["optim.momentum"]) == (0.7, "command line")
    assert config.data.name == "folder"  # the embedded default is not below a YAML


def test_without_a_file_the_embedded_default_is_below_the_command_line() -> None:
    resolved = load(["optim.epochs=3"])
    assert resolved.config.data.name == "digits"
    assert resolved.config.method.name == "adadim"
    assert resolved.origins["method.alpha_every"] == "embedded default"
    assert resolved.config.optim.epochs == 3


@pytest.mark.parametrize("name", builtin_methods())
def test_the_embedded_default_serves_every_method(name: str) -> None:
    config = load([f"method.name={name}"]).config
    assert config.data.name == "digits"
    assert config.data.batch_size % 8 == 0


def test_a_method_has_its_own_entry_in_the_embedded_default(tmp_path: Path) -> None:
    """Above the embedded default, below the command line, and not below a YAML."""
    resolved = load(["method.name=nnclr"])
    assert resolved.config.method.queue_size == 1024
    assert resolved.origins["method.queue_size"] == "embedded default"
    assert resolved.origins["model.projector"] == "embedded default"
    assert resolved.config.model.projector == [512, 512, 128]
    assert load(["method.name=nnclr", "method.queue_size=2048"]).config.method.queue_size == 2048
    in_file = load([write(tmp_path / "c.yaml", "method: {name: nnclr}")])
    assert in_file.config.method.queue_size == 65536
    (views,) = load(["method.name=ressl", "data.views.0.size=16"]).config.data.views
    assert (views.size, views.recipe, views.scale) == (16, "ressl", (0.4, 1.0))


RECIPES = ("folder/adadim", "list/adadim", "stl10/adadim", "imagenet100/barlow_twins_multiview",
           "imagenet100/vicreg", "cifar/ablation/alpha_1", "cifar/mmcr")  # fmt: skip


@pytest.mark.parametrize("yaml", RECIPES)
@pytest.mark.parametrize("name", [*builtin_methods(), "tests.outside:LargeOnly"])
def test_a_yaml_serves_every_method(name: str, yaml: str) -> None:
    own = load([yaml])
    resolved = load([yaml, f"method.name={name}"])
    config, origins = resolved.config, resolved.origins
    assert config.method.name == name
    if name == own.config.method.name:
        assert (config.model_dump(), resolved.notes) == (own.config.model_dump(), ())
        return
    (note,) = resolved.notes
    folder, _, stem = yaml.rpartition("/")
    sibling = ROOT / "configs" / folder / f"{name}.yaml"
    if sibling.is_file() and stem == own.config.method.name:
        assert note == f"method.name={name}: takes {folder}/{name} in place of {yaml}"
        assert config.model_dump() == load([str(sibling)]).config.model_dump()
        return
    data = own.config.data.model_dump(exclude={"views"})
    assert config.data.model_dump(exclude={"views"}) == data
    assert [(v.count, v.size) for v in config.data.views] == [
        (v.count, v.size) for v in own.config.data.views
    ]
    assert (config.run, config.log) == (own.config.run, own.config.log)
    # Two methods' recipes have a rate for the probe, and no YAML here has one.
    assert config.eval.model_dump(exclude={"probe_lr"}) == own.config.eval.model_dump(
        exclude={"probe_lr"}
    )
    for key in ("backbone", "backbone_args", "stem", "batch_norm"):
        assert getattr(config.model, key) == getattr(own.config.model, key)
    assert config.optim.epochs == own.config.optim.epochs
    method = load_method(name).config_class
    # All else is as without a YAML's word on it: the method's recipe, or the default.
    assert [key for key in origins if key.startswith("method.")] == ["method.name"]
    recipe = method.recipe.get("data", {}).get("views", [{}])[0].get("recipe", "asym")
    assert {(view.recipe, *view.overrides) for view in config.data.views} == {(recipe,)}
    for key, value in {"lr": 0.4, "weight_decay": 1e-4, "name": "lars"}.items():
        assert getattr(config.optim, key) == method.recipe.get("optim", {}).get(key, value)
    assert config.model.projector == method.recipe.get("model", {}).get("projector", [2048] * 3)
    assert note.startswith(f"method.name={name}: not taken from ")
    assert {"optim.lr", "model.projector"} <= set(note.rpartition(": ")[2].split(", "))


def test_keys_that_are_typed_hold_with_another_method() -> None:
    typed = ("optim.lr=0.7", "model.projector=[64, 32]", "data.views.0.recipe=weak",
             "method.temperature=0.3", "data.views.0.scale=[0.5, 1]")  # fmt: skip
    for yaml in ("folder/adadim", "cifar/adadim"):
        resolved = load([yaml, "method.name=simclr", *typed])
        config = resolved.config
        assert (config.optim.lr, config.model.projector) == (0.7, [64, 32])
        assert config.method.temperature == 0.3
        (view,) = config.data.views
        assert (view.recipe, view.scale) == ("weak", (0.5, 1))
        assert not {"optim.lr", "model.projector"} & set(" ".join(resolved.notes).split(", "))
        with pytest.raises(ConfigError, match=r"method\.alpha_every: unknown key"):
            load([yaml, "method.name=simclr", "method.alpha_every=3"])


def test_a_method_of_one_size_keeps_the_large_views(tmp_path: Path) -> None:
    views = "[{count: 2, size: 64, recipe: sym, blur_p: 0}, {count: 6, size: 32, recipe: sym}]"
    text = f"method: {{name: swav}}\nmeasure: {{every: 3}}\ndata: {{views: {views}}}\n"
    file = write(tmp_path / "c.yaml", text)
    config = load([file, "method.name=ressl"]).config
    assert [(v.count, v.size, v.recipe) for v in config.data.views] == [(2, 64, "ressl")]
    assert config.measure.every == 3
    both = load([file, "method.name=byol"]).config.data.views
    assert [(v.count, v.size, v.recipe, v.overrides) for v in both] == [
        (2, 64, "asym", {}), (6, 32, "asym", {})
    ]  # fmt: skip


def test_a_method_from_outside_takes_the_settings_of_its_parent_or_its_own() -> None:
    outside = f"method.name={__name__.rpartition('.')[0]}.outside"
    parent = load(["method.name=byol"]).config
    config = load([f"{outside}:OtherBYOL"]).config
    assert (config.data, config.optim, config.model) == (parent.data, parent.optim, parent.model)
    resolved = load([f"{outside}:OwnBYOL"])
    assert (resolved.config.optim.lr, resolved.config.optim.name) == (0.7, "lars")
    assert resolved.origins["optim.lr"] == "embedded default"


def test_the_package_has_settings_of_its_own_methods_alone() -> None:
    names = {path.stem for path in DIGITS.glob("*.yaml")}
    assert names - {"default"} < set(builtin_methods())


def test_a_key_of_another_method_is_refused_when_the_user_gives_it() -> None:
    with pytest.raises(ConfigError, match=r"method\.alpha_every: unknown key"):
        load(["method.name=vicreg", "method.alpha_every=3"])


def test_the_tree_is_frozen_and_written_as_yaml_that_reads_back(tmp_path: Path) -> None:
    resolved = load(["data.views.0.scale=[0.2, 0.9]", "optim.grad_clip=1e-3", "method.beta=off"])
    with pytest.raises(ValidationError):
        resolved.config.optim.lr = 1.0  # type: ignore[misc]
    text = resolved.to_yaml()
    assert "# embedded default" in text
    assert "# command line" in text
    again = load([write(tmp_path / "config.yaml", text)])
    assert again.config.model_dump() == resolved.config.model_dump()


ERRORS = {
    "optim.epoch=3": "optim.epoch: unknown key; did you mean optim.epochs?",
    "method.alpha_evry=3": "method.alpha_evry: unknown key of adadim; did you mean",
    "optm.lr=1": "optm: unknown section; did you mean optim?",
    "epochs=3": "epochs: expected section.key=value; did you mean optim.epochs?",
    "optim.lr=fast": "optim.lr: input should be a valid number",
    "optim.lr=.nan": "optim.lr: input should be a finite number",
    "optim.lr=-1": "optim.lr: input should be greater than 0, got -1",
    "optim.name=larss": "optim.name: input should be 'lars', 'sgd', 'adam', 'adamw' or 'muon', got",
    "model.projector=[]": "model.projector: list should have at least 1 item",
    "model.projector=[8, 0]": "model.projector.1: input should be greater than or equal to 1",
    "method.name=simclrr": "method.name: unknown method 'simclrr'; did you mean simclr?",
    "method.name=nowhere:Class": "method.name: cannot import 'nowhere:Class'",
    "method.name=json:JSONDecoder": "is not a subclass of ddp_ssl.methods.base.Method",
    "data.views.0.recipe=asim": "unknown recipe 'asim'; did you mean asym?",
    "data.views.0.siz=3": "data.views.0.siz: unknown key; did you mean data.views.0.size?",
    "data.views.7.size=32": "data.views.7.size: data.views has 1 items to set",
    "data.views=[{count: 1}]": "data.views: adadim compares views of an image and needs at least 2",
    "data.views.0.scale=[0.9, 0.2]": "expected [low, high] with 0 < low <= high, got [0.9, 0.2]",
    "data.batch_size=1": "data.batch_size: batch normalisation needs 2 images or more, got 1",
    "optim.accumulate=0": "optim.accumulate: input should be greater than or equal to 1, got 0",
    "checkpoint.keep=1": "checkpoint.keep: input should be greater than or equal to 2, got 1",
    "data.views=[": "data.views: not a YAML value",
    "run.dir=" + "x" * 300: "run.dir: a name of 300 bytes; accepted: 255 for a name",
    "--epochs": "--epochs: a key and its value are one word: optim.epochs=VALUE",
    "--wandb": "--wandb: unknown option",
    "optim.foo=1": "optim.foo: unknown key; --help optim lists the keys",
    "foo.bar=1": "foo: unknown section; sections are run, method, model",
    "model.projector=64,32": "a list is written 'model.projector=[64,32]'",
    "data.views=[count:2]": "braces need quotes in a shell",
    "model.backbone=resnt18": "model.backbone: timm has no model 'resnt18'; did you mean resnet18?",
    "model.backbone=hf_hub:a/b": "model.backbone: hf_hub:a/b is a place of weights, not a model",
    "nowhere.yaml": "nowhere.yaml: cannot be read: No such file or directory",
    "nonsense": "nonsense: no such file, folder or config; accepted: CONFIG.yaml",
    "imagenet100/adadin": "did you mean imagenet100/adadim",
    "ablation/beta_off": "did you mean cifar/ablation/beta_off or imagenet100/ablation/beta_off?",
}


@pytest.mark.parametrize("argument", ERRORS)
def test_an_error_is_one_line_that_says_what_would_be_accepted(argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([argument])
    assert ERRORS[argument] in str(caught.value)
    assert "\n" not in str(caught.value)


OF_OTHER_TOOLS = {
    "learning_rate=0.3": "optim.lr",
    "optim.learning_rate=0.3": "optim.lr",
    "--learning-rate=0.3": "optim.lr",
    "train.batch_size=64": "data.batch_size",
    "optim.batch_size=64": "data.batch_size",
    "num_workers=4": "data.threads",
    "trainer.max_epochs=100": "optim.epochs",
    "optim.warmup=5": "optim.warmup_epochs",
    "model.weight_decay=0.1": "optim.weight_decay",
    "arch=resnet50": "model.backbone",
    "model=resnet50": "model.backbone",
    "method.backbone=resnet50": "model.backbone",
    "temperature=0.1": "method.temperature",
    "method.tau=0.1": "method.temperature",
    "data.size=32": "data.views.0.size",
    "optim=adamw": "optim.name",
    "out=runs/one": "run.dir",
    "every=3": "eval.every or measure.every or checkpoint.every",
}


@pytest.mark.parametrize("argument", OF_OTHER_TOOLS)
def test_the_names_of_other_tools_lead_to_the_key(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {OF_OTHER_TOOLS[argument]}\\?$"):
        load([argument])


def test_each_name_of_other_tools_stands_for_one_key_that_there_is() -> None:
    every = set(known_keys(Config))
    for name in builtin_methods():
        every |= set(known_keys(with_method(load_method(name).config_class)))
    assert set(OTHER_NAMES) <= every
    names = [name for text in OTHER_NAMES.values() for name in text.split()]
    assert len(names) == len(set(names))
    assert not {f"optim.{name}" for name in names} & every


MISWRITTEN = {
    "lr 0.3": "lr: a key and its value are one word: optim.lr=0.3",
    "lr = 0.3": "lr: a key and its value are one word: optim.lr=0.3",
    "optim.lr: 0.3": "a key and its value are one word: optim.lr=0.3",
    "optim.lr= 0.3": "0.3: a value stands right after its `=`: optim.lr=0.3",
    "cifar/adadim --epochs 10": "--epochs: a key and its value are one word: optim.epochs=10",
    "model.projector=[64, 32]": "needs quotes: 'model.projector=[64, 32]'",
    "data.views=[{count: 2, size: 32}] run.seed=1": "quotes: 'data.views=[{count: 2, size: 32}]'",
    "--gpus 8": "--gpus: torchrun --nproc_per_node N or srun starts the processes",
    "--config cifar/adadim": "--config: the config's name or path stands alone",
    "imagenet 100": "did you mean imagenet/adadim",
}


@pytest.mark.parametrize("line", MISWRITTEN)
def test_a_key_cut_off_from_its_value_is_put_together(line: str) -> None:
    """The words are those that a shell makes of the line."""
    with pytest.raises(ConfigError) as caught:
        load(line.split())
    assert MISWRITTEN[line] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_names_of_backbones_are_read_without_timm_and_are_all_of_timms() -> None:
    models, renamed = backbones._in_source()
    assert set(models) == set(timm.list_models())
    assert set(renamed) == set(get_deprecated_models())
    check_backbone("resnet18.a1_in1k")
    check_backbone("vit_base_patch16_224.foo")  # the tag is timm's to check


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    for text, message in {
        "optim: {lr: x}": "optim.lr: input should be a valid number",
        "optim: {lr: 1, lr: 2}": "key 'lr' is given twice",
        "optim: [1]": "optim: input should be a valid dictionary",
        "- 1": "expected sections such as `optim:`",
        "optim: {": "not valid YAML",
        "optim: {epoch: 1}": "optim.epoch: unknown key",
    }.items():
        file = write(tmp_path / "bad.yaml", text)
        with pytest.raises(ConfigError) as caught:
            load([file])
        assert message in str(caught.value)
        assert "bad.yaml" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_numbers_and_words_of_yaml(tmp_path: Path) -> None:
    tree = read_yaml(Path(write(tmp_path / "c.yaml", "a: {x: 1e-4, y: off, z: true, w: 3e2}")))
    assert tree == {"a": {"x": 1e-4, "y": "off", "z": True, "w": 300.0}}


def test_the_batch_must_split_evenly() -> None:
    config = load(["data.batch_size=64"]).config
    check_world_size(config, 8)
    with pytest.raises(ConfigError, match="64 images cannot be split evenly over 3 processes; 63"):
        check_world_size(config, 3)


def test_views_must_split_evenly_over_the_processes_that_share_them() -> None:
    views = "data.views=[{count: 4, size: 32, recipe: sym}, {count: 2, size: 16, recipe: sym}]"
    config = load([views, "data.view_shards=2", "data.batch_size=6"]).config
    for size in (2, 4, 6, 12):
        check_world_size(config, size)
    with pytest.raises(ConfigError, match=r"^data.view_shards: 2 does not divide the 9 processes"):
        check_world_size(config, 9)
    with pytest.raises(ConfigError, match=r"6 images cannot be split evenly over 4 groups of 2 pr"):
        check_world_size(config, 8)
    with pytest.raises(ConfigError, match=r"does not divide the 2 views of 16 pixels; 1 or 2 wou"):
        load([views, "data.view_shards=4"])


def test_a_local_norm_needs_two_images() -> None:
    config = load(["data.batch_size=6", "model.batch_norm=local"]).config
    check_world_size(config, 3)
    with pytest.raises(ConfigError, match=r"^data.batch_size: 6 images over 6 processes leave one"):
        check_world_size(config, 6)


def test_half_precision_images_need_autocast() -> None:
    with pytest.raises(ConfigError, match=r"^data.dtype: float16 images need autocast"):
        load(["data.dtype=float16", "optim.precision=fp32"])
    with pytest.raises(ConfigError, match=r"data\.dtype"):
        load(["data.dtype=float16", "optim.precision=tf32"])
    load(["data.dtype=float16", "optim.precision=bf16"])


def test_identity_is_the_experiment_not_where_it_runs() -> None:
    a = identity(load([]).config)
    b = identity(
        load(["run.dir=x", "data.name=digits", "data.root=y", "eval.every=1", "data.threads=3",
              "log.every_steps=1"]).config
    )  # fmt: skip
    assert a == b
    for change in ("run.seed=1", "optim.lr=0.2", "method.alpha=fixed", "data.batch_size=64"):
        assert identity(load([change]).config) != a


def test_every_free_key_is_a_key_of_the_schema() -> None:
    keys = [row[0] for row in reference()]
    for pattern in (*FREE_ON_RESUME, *NOT_FREE):
        assert fnmatch.filter(keys, pattern), pattern


def test_a_method_from_outside_the_package() -> None:
    name = f"{__name__.rpartition('.')[0]}.outside:Outside"
    config = load([f"method.name={name}", "method.strength=2"]).config
    assert config.method.model_dump() == {"name": name, "strength": 2.0}
    with pytest.raises(ConfigError, match=r"method\.strenth: unknown key of outside; did you mean"):
        load([f"method.name={name}", "method.strenth=2"])


def test_a_method_that_cannot_use_small_crops_refuses_them() -> None:
    name = f"method.name={__name__.rpartition('.')[0]}.outside:LargeOnly"
    small = "{count: 6, size: 96, recipe: sym}"
    large = "{count: 2, size: 224, recipe: sym}"
    assert load([name, f"data.views=[{large}, {large}]"]).config.num_views == 4
    with pytest.raises(ConfigError, match=r"^data.views: .* takes views of one size only"):
        load([name, f"data.views=[{large}, {small}]"])


def test_the_threads_of_a_process_are_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert cpu_share() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cpu_share() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cpu_share() == 1


def test_no_torch_before_the_config_is_valid() -> None:
    code = (
        "import sys; from ddp_ssl.train import main; code = main(['optim.epoch=3']); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == ("ddp_ssl: error: optim.epoch: unknown key; did you mean optim.epochs?\n")


def test_help_imports_neither_networks_nor_image_readers() -> None:
    code = (
        "import sys; from ddp_ssl.train import main; main(['--help']); "
        "sys.exit(bool({'timm', 'torchvision', 'nvidia.dali'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "optim.lr" in done.stdout


def test_every_yaml_validates_and_says_where_it_comes_from() -> None:
    assert len(YAMLS) >= 6
    for path in YAMLS:
        config = load([str(path), "data.root=somewhere"]).config
        assert config.data.root == "somewhere"
        head = path.read_text()
        for word in (
            "# paper ",
            "# source ",
            "# equal ",
            "# differs ",
            "# expected ",
            "# machine ",
            "# command ",
            config.method.name,
        ):
            assert word in head, (path, word)
        assert f"{path.relative_to(ROOT)} data.root=DIR" in head


def test_every_key_is_documented_and_the_reference_is_up_to_date() -> None:
    rows = list(reference())
    contract = (
        "run.dir run.seed run.resume run.init_from method.name model.backbone data.name data.root "
        "data.batch_size optim.epochs optim.lr eval.every measure.every checkpoint.every_steps "
        "checkpoint.keep_every checkpoint.best"
    )
    assert set(contract.split()) <= {row[0] for row in rows}
    assert [row[0] for row in rows if not row[3]] == []
    for name in builtin_methods():
        method = load_method(name).config_class
        assert all(row[3] for row in reference(method))
    page = subprocess.run(
        [sys.executable, "tools/config_reference.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    assert page == (ROOT / "docs/config.md").read_text(), "run `make docs`"


def test_a_file_with_an_equals_sign_in_its_path_is_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "seed=3"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {seed: 3}\ndata: {name: digits}\n")
    assert load([str(folder / "config.yaml")]).config.run.seed == 3


def test_a_yaml_that_names_no_method_is_for_any(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("optim: {name: sgd, lr: 0.77}\nmodel: {projector: [64, 32]}\n")
    resolved = load([str(base), "method.name=simclr"])
    assert (resolved.config.optim.name, resolved.config.optim.lr) == ("sgd", 0.77)
    assert resolved.config.model.projector == [64, 32]
    assert resolved.notes == ()


def test_a_config_of_another_backbone_keeps_it() -> None:
    """A sibling takes the place of a method's own config alone."""
    resolved = load(["imagenet/mocov3_vits16", "method.name=adadim"])
    assert resolved.config.model.backbone == "vit_small_patch16_224"
    assert resolved.config.optim.epochs == 300
    assert load(["imagenet/mocov3", "method.name=adadim"]).config.optim.epochs == 400
