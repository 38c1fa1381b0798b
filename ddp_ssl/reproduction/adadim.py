"""AdaDim's tables and figures (Kokilepersaud, Prabhushankar & AlRegib 2025).

Two settings, as the paper has them. *Tuned* (Tables 6, 12, 15): each method's own recipe.
*Standardised* (Tables 9, 19, 22 and the figures): Table 17's hyperparameters and one augmentation
for all. The paper only says that it is weaker than the tuned one; here it is `weak`, solo-learn's
weaker symmetric scheme.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from ddp_ssl.reproduction.cells import Cell, Simulation, Table, published, short_name

# Side of the crops, whether the stem is for small images (padding 2, the code base's). The paper
# does not say; as in `configs/`.
SETS = {
    "cifar100": (32, True),
    "cifar10": (32, True),
    "tiny_imagenet": (64, True),
    "cinic10": (32, True),
    "stl10": (96, False),
    "blood": (28, True),
    "organa": (28, True),
    "organs": (28, True),
    "organc": (28, True),
    "inat21": (224, False),
}
Made = tuple[str, str, tuple[str, ...]]  # name of the run, its base, overrides

SIX = ("cifar100", "cifar10", "tiny_imagenet", "cinic10", "blood", "organs")
METHODS = {
    "SimCLR": "simclr",
    "VICReg": "vicreg",
    "MoCo v2+": "mocov2plus",
    "BYOL": "byol",
    "Barlow Twins": "barlow_twins",
    "NNCLR": "nnclr",
    "SimSiam": "simsiam",
    "DeepCluster v2": "deepclusterv2",
    "MoCo v3": "mocov3",
    "DINO": "dino",
    "ReSSL": "ressl",
    "SwAV": "swav",
}
# Table 17, where it differs from the recipes of `configs/cifar`. Its three widths of methods with a
# predictor are solo-learn's: projector's hidden layer, predictor's hidden layer, output. MoCo's
# momentum, 0.9 to 0.99 there, stays solo-learn's.
TABLE_17 = {"simsiam": ("optim.name=lars",)}


def on(dataset: str) -> tuple[str, ...]:
    """A CIFAR recipe on another data set: crops, stem, and the recipe's own blur from 64 px on."""
    size, small = SETS[dataset]
    return (
        f"data.name={dataset}",
        f"data.views.0.size={size}",
        *(("data.views.0.blur_p=null",) if size >= 64 else ()),
        *(("data.val_interpolation=bilinear",) if size == 224 else ()),
        f"model.stem={'small_pad2' if small else 'standard'}",
    )


def tuned(method: str, dataset: str) -> Made:
    """Name, base and overrides of a method's own recipe."""
    return f"tuned-{method}", f"cifar/{method}.yaml", on(dataset)


WEAK = ("data.views.0.recipe=weak", "data.views.0.blur_p=null")


def balanced(name: str, dataset: str, *overrides: str) -> Made:
    """A row of the ablation in the standardised setting: `alpha_0.5`, `beta_off`, `adadim`."""
    base = {"simclr": "simclr_mi", "vicreg": "vicreg_mi"}.get(name, name)
    folder = "cifar" if base in ("adadim", "simclr_mi", "vicreg_mi") else "cifar/ablation"
    without = ("method.beta=off",) if name in ("simclr", "vicreg") else ()
    run = "-".join(["standard", name, *(short_name(o) for o in overrides)])
    return run, f"{folder}/{base}.yaml", (*on(dataset), *WEAK, *without, *overrides)


def alpha(value: float, dataset: str, *overrides: str) -> Made:
    """Alpha fixed, no mutual information term, standardised setting; 0 is VICReg."""
    if value == 0:
        return balanced("vicreg", dataset, *overrides)
    run, base, rest = balanced("alpha_0.5", dataset, *overrides)
    name = run.replace("alpha_0.5", f"alpha_{value:g}")
    return name, base, (*rest, f"method.alpha_value={value:g}")


def standard(method: str, dataset: str, *overrides: str) -> Made:
    """A baseline in the standardised setting, Table 17."""
    run = "-".join(["standard", method, *(short_name(o) for o in overrides)])
    rest = (*on(dataset), *WEAK, *TABLE_17.get(method, ()), *overrides)
    return run, f"cifar/{method}.yaml", rest


def _cell(table: str, dataset: str, row: str, made: Made) -> Cell:
    return Cell(dataset, row, *made, published(table, row, dataset))


def table6(dataset: str) -> list[Cell]:
    """Ten combinations of alpha and beta, tuned setting."""
    rows = {
        "alpha 0": "alpha_0",
        "alpha 1": "alpha_1",
        "alpha 0.5": "alpha_0.5",
        "alpha adaptive": "beta_off",
        "alpha cosine": "alpha_cosine",
        "alpha linear": "alpha_linear",
        "alpha adaptive, beta fixed": "beta_fixed",
        "alpha 1, beta fixed": "alpha_1_beta_fixed",
        "alpha 0, beta fixed": "alpha_0_beta_fixed",
        "alpha and beta adaptive": "beta_adaptive",
    }
    return [
        _cell("table6", dataset, row, (_tuned_name(f), f"cifar/ablation/{f}.yaml", on(dataset)))
        for row, f in rows.items()
    ]


def _tuned_name(ablation: str) -> str:
    return "tuned-adadim" if ablation == "beta_adaptive" else f"tuned-adadim-{ablation}"


def table9(dataset: str) -> list[Cell]:
    """The ablation over data sets, standardised setting."""
    rows = {
        "SimCLR": balanced("simclr", dataset),
        "VICReg": balanced("vicreg", dataset),
        "SimCLR + I": balanced("simclr_mi", dataset),
        "VICReg + I": balanced("vicreg_mi", dataset),
        "alpha 0.5": alpha(0.5, dataset),
        "alpha cosine": balanced("alpha_cosine", dataset),
        "alpha linear": balanced("alpha_linear", dataset),
        "alpha adaptive": balanced("beta_off", dataset),
        "alpha and beta adaptive": balanced("adadim", dataset),
    }
    return [_cell("table9", dataset, row, made) for row, made in rows.items()]


def table12(dataset: str) -> list[Cell]:
    """Thirteen methods on ImageNet-100, ResNet-18."""
    names = {**METHODS, "AdaDim": "adadim"}
    rows = {row: (f"tuned-{m}", f"imagenet100/{m}.yaml", ()) for row, m in sorted(names.items())}
    return [_cell("table12", dataset, row, made) for row, made in rows.items()]


def table15(dataset: str) -> list[Cell]:
    """Eleven rows with each method's own recipe."""
    rows = {row: tuned(METHODS[row], dataset) for row in list(METHODS)[:9]}
    rows["AdaDim, alpha"] = (_tuned_name("beta_off"), "cifar/ablation/beta_off.yaml", on(dataset))
    rows["AdaDim"] = tuned("adadim", dataset)
    return [_cell("table15", dataset, row, made) for row, made in rows.items()]


def table19(dataset: str) -> list[Cell]:
    """Alpha by hand, beta off."""
    rows = {"SimCLR": balanced("simclr", dataset), "VICReg": balanced("vicreg", dataset)}
    rows |= {f"alpha {value:g}": alpha(value, dataset) for value in (0.2, 0.4, 0.5, 0.6, 0.8)}
    rows["alpha adaptive"] = balanced("beta_off", dataset)
    return [_cell("table19", dataset, row, made) for row, made in rows.items()]


def table22(dataset: str) -> list[Cell]:
    """Other methods in the standardised setting."""
    rows = {"SimCLR": balanced("simclr", dataset), "VICReg": balanced("vicreg", dataset)}
    for row in ("MoCo v2+", "BYOL", "Barlow Twins", "NNCLR", "SimSiam"):
        rows[row] = standard(METHODS[row], dataset)
    rows["alpha adaptive"] = balanced("beta_off", dataset)
    return [_cell("table22", dataset, row, made) for row, made in rows.items()]


# Table 18. Its last two NNCLR rows are equal to others; 1e-5 is SimCLR's in the same place.
RATES = [(0.6, t, 1e-6) for t in (0.05, 0.07, 0.1, 0.2, 0.3, 0.4)]
RATES += [(0.5, t, 1e-6) for t in (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4)]
RATES += [(0.5, 0.15, 1e-7), (0.5, 0.15, 1e-5)]
COVARIANCES = [n / 10 for n in range(3, 18)]


def _random_models(method: str, dataset: str, epochs: int, count: int) -> list[Cell]:
    label = {"simclr": "SimCLR", "vicreg": "VICReg", "nnclr": "NNCLR"}[method]
    group = f"{label}, {epochs} epochs"
    cells = []
    if method == "vicreg":
        settings = [
            (f"covariance {c:g}", (f"method.covariance={c:g}", "optim.lr=0.3",
             "optim.weight_decay=1e-6")) for c in COVARIANCES
        ]  # fmt: skip
    else:
        settings = [
            (f"lr {lr:g}, tau {t:g}, decay {wd:g}",
             (f"optim.lr={lr:g}", f"method.temperature={t:g}", f"optim.weight_decay={wd:g}"))
            for lr, t, wd in RATES
        ]  # fmt: skip
    for row, keys in settings[:count]:
        name = "-".join([f"random-{method}", f"epochs_{epochs}", *(short_name(k) for k in keys)])
        wide = ("model.projector=[2048, 2048, 2048]",)
        rest = (*on(dataset), *WEAK, *wide, f"optim.epochs={epochs}", *keys)
        cells.append(Cell(group, row, name, f"cifar/{method}.yaml", rest))
    return cells


def table18(dataset: str) -> list[Cell]:
    """The 45 models, each beside what was published of it."""
    cells = []
    for method in ("simclr", "vicreg", "nnclr"):
        made = _random_models(method, dataset, 100, 15)
        lines = [line for line in _models() if line["method"] == method]
        cells += [
            replace(cell, paper={m: (float(line[c]), None) for m, c in COLUMNS.items()})
            for cell, line in zip(made, lines, strict=True)
        ]
    return cells


COLUMNS = {"probe": "accuracy", "rank": "effective_rank", "information": "mutual_information"}


@cache
def _models() -> list[dict[str, str]]:
    with open(Path(__file__).with_name("adadim_table18.csv"), newline="") as file:
        return list(csv.DictReader(file))


def table3(dataset: str) -> list[Cell]:
    """Models with other hyperparameters: accuracy against rank and information."""
    cells = []
    if dataset == "cifar100":
        for method in ("simclr", "vicreg", "nnclr"):
            cells += _random_models(method, dataset, 100, 15)
        for row, method in METHODS.items():
            if method != "dino":
                run, base, rest = tuned(method, dataset)
                rest = (*rest, "model.backbone=resnet18", "optim.epochs=1000")
                group = "eleven methods, ResNet-18"
                cells.append(Cell(group, row, f"{run}-resnet18-epochs_1000", base, rest))
    cells += _random_models("simclr", dataset, 400, 10)
    if dataset == "cifar100":
        cells += _random_models("vicreg", dataset, 400, 10)
    return cells


END = ("probe", "rank", "information")


def _rows(group: str, rows: dict[str, Made]) -> list[Cell]:
    return [Cell(group, row, *made) for row, made in rows.items()]


def _alphas(values: Sequence[float], adaptive: bool, dataset: str) -> list[Cell]:
    """Alpha by hand, and adaptive if asked for."""
    rows = {f"alpha {v:g}": alpha(v, dataset) for v in values}
    return _rows(
        dataset, rows | ({"alpha adaptive": balanced("beta_off", dataset)} if adaptive else {})
    )


figure1a = partial(_alphas, [n / 20 for n in range(21)], False)
figure6 = partial(_alphas, [n / 5 for n in range(6)], True)
figure13 = partial(_alphas, (0, 0.2, 0.4, 0.5, 0.6, 0.8, 1), False)


def figure1b(dataset: str) -> list[Cell]:
    """SimCLR, ResNet-18, 1000 epochs."""
    keys = ("model.backbone=resnet18", "optim.epochs=1000")
    return _rows(dataset, {"SimCLR": balanced("simclr", dataset, *keys)})


def _long(epochs: int, methods: Sequence[str], dataset: str) -> list[Cell]:
    """Many epochs, R and Z both of 2048 dimensions."""
    keys = (f"optim.epochs={epochs}", "model.projector=[2048, 2048, 2048]")
    names = {v: k for k, v in METHODS.items()} | {"adadim": "AdaDim"}
    made = {
        names[m]: (balanced if m in ("simclr", "vicreg", "adadim") else standard)(m, dataset, *keys)
        for m in methods
    }
    return _rows(dataset, made)


figure3 = partial(_long, 2000, ("simclr", "vicreg", "nnclr", "barlow_twins"))
figure12 = partial(_long, 2000, ("simclr", "vicreg"))
figure15 = partial(_long, 1000, ("simclr", "vicreg", "adadim"))


def figure7(dataset: str) -> list[Cell]:
    """Adaptive beta of several sizes and both signs, and the two losses alone."""
    values = ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "-1e-4", "-1e-2", "-1e-1")
    rows = {f"beta {b}": balanced("adadim", dataset, f"method.beta_scale={b}") for b in values}
    rows["beta 1e-4"] = balanced("adadim", dataset)
    rows |= {"SimCLR": balanced("simclr", dataset), "VICReg": balanced("vicreg", dataset)}
    return _rows(dataset, rows)


def figure14(dataset: str) -> list[Cell]:
    """Adam against LARS."""
    adam = ("optim.name=adam", "optim.lr=1e-3", "optim.weight_decay=1e-6")
    cells = []
    for row, name in {"SimCLR": "simclr", "VICReg": "vicreg", "AdaDim": "adadim"}.items():
        cells += _rows(dataset, {f"{row}, LARS": balanced(name, dataset)})
        cells += _rows(dataset, {f"{row}, Adam": balanced(name, dataset, *adam)})
    return cells


def figure17(dataset: str) -> list[Cell]:
    """Training time: alpha by hand and adaptive."""
    cells = []
    for epochs in (100, 200, 400, 800):
        keys = () if epochs == 400 else (f"optim.epochs={epochs}",)
        rows = {f"alpha {v:g}": alpha(v, dataset, *keys) for v in (0, 0.5, 1)}
        rows["alpha adaptive"] = balanced("beta_off", dataset, *keys)
        cells += _rows(f"{epochs} epochs", rows)
    return cells


def figure18(dataset: str) -> list[Cell]:
    """Width of the projector, temperature, and nu."""
    cells = []
    for width in (512, 1024, 2048, 4096, 8192):
        keys = () if width == 2048 else (f"model.projector=[2048, 2048, {width}]",)
        cells += _rows("a: width", {
            f"AdaDim, {width}": balanced("adadim", dataset, *keys),
            f"VICReg, {width}": balanced("vicreg", dataset, *keys),
        })  # fmt: skip
    for value in (0.05, 0.07, 0.1, 0.2, 0.3, 0.4):
        keys = () if value == 0.1 else (f"method.temperature={value:g}",)
        cells += _rows("b: temperature", {f"tau {value:g}": balanced("adadim", dataset, *keys)})
    for value in (1, 10, 20, 50, 100):
        keys = () if value == 20 else (f"method.alpha_every={value}",)
        cells += _rows("c: nu", {f"nu {value}": balanced("adadim", dataset, *keys)})
    return cells


P = "AdaDim"
STANDARD = (
    "Standardised setting: Table 17's hyperparameters and one augmentation for all methods, "
    "`weak` here; the paper says only that its tuned comparison has a stronger one."
)
NO_NUMBERS = "Published as a picture only."
NINE = ("cifar100", "cifar10", "tiny_imagenet", "cinic10", "blood", "organs", "inat21")


TABLES: list[Table | Simulation] = [
    Table("table3", P, "accuracy against rank and information, |r| over models",
          ("cifar100", "tiny_imagenet", "cinic10", "cifar10", "organs"), table3, END,
          "100 epochs: the 45 models of Table 18. 400 epochs: ten of them, since the paper does "
          "not list its own. The ratio is I / effective rank. " + STANDARD,
          picture="balance", correlate=True),
    Table("table6", P, "alpha and beta on CIFAR-100", ("cifar100",), table6,
          notes="Tuned setting.", small=lambda cell: True),
    Table("table9", P, "the same over data sets", NINE, table9, notes=STANDARD,
          small=lambda cell: True),
    Table("table12", P, "thirteen methods on ImageNet-100, ResNet-18", ("imagenet100",), table12,
          notes="All but AdaDim are solo-learn's figures."),
    Table("table15", P, "eleven methods, each with its own recipe",
          ("cifar100", "tiny_imagenet", "cinic10", "stl10", "blood", "organa", "organs", "organc"),
          table15, notes="CIFAR's recipes on every data set, with its crop size and stem."),
    Table("table18", P, "45 models: accuracy, rank and information of each", ("cifar100",),
          table18, END, "The runs are Table 3's of 100 epochs; the last NNCLR row is published "
          "with the weight decay of another row. " + STANDARD, picture="balance"),
    Table("table19", P, "alpha by hand", NINE, table19, small=lambda cell: True,
          notes=STANDARD + " Tables 9 and 19 print some adaptive rows differently, by up to 1 "
          "point: read that as the papers' own noise."),
    Table("table22", P, "other methods, standardised", ("cifar100", "tiny_imagenet", "cinic10"),
          table22, notes=STANDARD),
    Table("figure1a", P, "accuracy over rank and information, 21 values of alpha", ("cifar100",),
          figure1a, END, NO_NUMBERS, picture="balance", correlate=True),
    Table("figure1b", P, "rank and information over 1000 epochs of SimCLR, ResNet-18",
          ("cifar100", "cifar10", "tiny_imagenet"), figure1b, END,
          NO_NUMBERS + " Its three data sets are not named.", picture="dynamics"),
    Simulation("figure1c", P, "points on a sphere: more dimensions, then more uniform",
               ("-m", "ddp_ssl.reproduction.sphere", "--out", "{out}"), "seconds"),
    Simulation("figure2", P, "I(R;Z) of Gaussian clusters and their PCA; Equations 1 and 3",
               ("-m", "ddp_ssl.cli", "simulate", "--out", "{out}"), "a minute on two cores"),
    Table("figure3", P, "eigenvalues, uniformity and information over 2000 epochs", ("cifar100",),
          figure3, END, NO_NUMBERS + " Two of its four methods are our choice.",
          picture="dynamics"),
    Table("figure5", P, "accuracy over rank and information, the models of Table 3",
          ("cifar100",), table3, END, NO_NUMBERS + " The runs are Table 3's.",
          picture="balance", correlate=True),
    Table("figure6", P, "rank and information against alpha; adaptive alpha over epochs", SIX,
          figure6, END, NO_NUMBERS, picture="dynamics", small=lambda cell: True),
    Table("figure7", P, "size and sign of beta", ("cifar100",), figure7, END,
          NO_NUMBERS + " The values of beta are ours.", picture="dynamics"),
    Table("figure8", P, "effective rank against Rényi entropy of R", SIX, figure6,
          ("rank", "entropy"), NO_NUMBERS + " Its text says only that the two are correlated; the "
          "runs are Figure 6's.", small=lambda cell: True, picture="entropy"),
    Simulation("figure11", P, "the simulation with a network for the projection",
               ("-m", "ddp_ssl.cli", "simulate", "--network", "--out", "{out}"),
               "minutes on two cores"),
    Table("figure12", P, "SimCLR and VICReg over 2000 epochs", ("cifar100",), figure12, END,
          NO_NUMBERS, picture="dynamics"),
    Table("figure13", P, "accuracy over rank and information, alpha by hand", SIX, figure13, END,
          NO_NUMBERS, picture="balance", correlate=True),
    Table("figure14", P, "Adam against LARS", ("cifar100",), figure14, END, NO_NUMBERS,
          picture="dynamics"),
    Table("figure15", P, "AdaDim, VICReg and SimCLR over 1000 epochs", ("cifar100",), figure15,
          END, NO_NUMBERS, picture="dynamics"),
    Table("figure17", P, "training time", ("cifar100",), figure17,
          notes=NO_NUMBERS + " The numbers of epochs are ours."),
    Table("figure18", P, "projector width, temperature, nu", ("cifar100",), figure18, END,
          NO_NUMBERS + " The values are ours, but for nu = 20 and 100."),
]  # fmt: skip
