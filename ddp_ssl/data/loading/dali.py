"""The DALI graphs: a batch of images to views (training) or to central crops (evaluation).

No other module imports DALI; a loader imports this one when it is made. The same graph runs on a
CPU and on a GPU. Every random operator has a seed of its own, so adding one does not change the
draws of the others. The operators below are torchvision's, in DALI's terms;
`tests/data/test_pipeline.py` measures how close they come. Small images held in memory are
augmented on a CPU by `small_images.py` and only pass through here.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddp_ssl.config.views import QUARTERS, CentralCrop, View
from ddp_ssl.data.loading import recipes
from ddp_ssl.data.loading.formats import Decoding, PixelFormat
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings
from ddp_ssl.driver import find_driver, install_command
from ddp_ssl.errors import refused
from ddp_ssl.utils.seeds import hashed

try:
    dali: Any = importlib.import_module("nvidia.dali")
    dali_torch: Any = importlib.import_module("nvidia.dali.plugin.pytorch")
except ModuleNotFoundError:
    raise ValueError(
        f"nvidia-dali is not installed: {install_command(find_driver())} in a checkout mends it"
    ) from None

VERSION: str = dali.__version__
GRAPH = 2  # counts changes of the training graph; a saved state fits one graph only
fn, types, dmath = dali.fn, dali.types, dali.math
Node = Any  # a DALI DataNode: one image, or one number, per sample of the batch
Key = tuple[int, ...]  # names the random streams of a view
Reading = Callable[[], tuple[Node, Node]]  # makes the nodes of images and ids
Callback = Callable[[Any], Any]  # (BatchInfo) -> (encoded images or pixels, ids)

JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)


def train_iterator(
    reading: Reading,
    augmentation: Augmentation,
    settings: LoaderSettings,
    *,
    seed: int,
    batch_size: int,
    checkpoint: bytes | None = None,
) -> Any:
    """An endless iterator over `[{"view0": [n, S, S, 3], ..., "ids": [n, 1]}]`.

    `reading` makes the part of the graph that gives images and ids: `read` with its
    arguments. `checkpoint` is a blob of this graph's.
    """
    mode, form = augmentation.color_jitter, settings.form
    views = [_maker(view, mode, form, (seed, view_id)) for view_id, view in augmentation.keyed]
    pipe = dali.pipeline_def(_train_graph, enable_conditionals=True)(
        reading, views,
        batch_size=batch_size, num_threads=settings.cpu_threads, device_id=settings.device_id,
        seed=seed & 0x7FFFFFFF, prefetch_queue_depth=settings.prefetch, exec_dynamic=True,
        enable_checkpointing=True, checkpoint=checkpoint,
    )  # fmt: skip
    return _iterator(pipe, len(views))


def passing_iterator(
    source: Callback,
    views: int,
    settings: LoaderSettings,
    *,
    batch_size: int,
    checkpoint: bytes | None = None,
) -> Any:
    """The same for views that are made already: DALI keeps them ready and counts the batches.

    `source` gives, for a `BatchInfo`, `views` arrays `[n, S, S, 3]` (float16 or float32, as in
    `settings.form`) and the ids `[n, 1]`.
    """

    def graph() -> Any:
        return tuple(
            fn.external_source(
                source=source,
                num_outputs=views + 1,
                batch=True,
                batch_info=True,
                dtype=[types.FLOAT16 if settings.form.half else types.FLOAT] * views
                + [types.INT64],
                ndim=[3] * views + [1],
                layout=["HWC"] * views + [""],
            )
        )

    pipe = dali.pipeline_def(graph)(
        batch_size=batch_size, num_threads=1, device_id=None, seed=0,
        prefetch_queue_depth=settings.prefetch, exec_dynamic=True, enable_checkpointing=True,
        checkpoint=checkpoint,
    )  # fmt: skip
    return _iterator(pipe, views)


def eval_iterator(
    reading: Reading, crop: CentralCrop, settings: LoaderSettings, *, batch_size: int
) -> Any:
    """The same with one view and no randomness; ends when the source raises `StopIteration`."""
    pipe = dali.pipeline_def(_eval_graph)(
        reading, crop, settings.form,
        batch_size=batch_size, num_threads=settings.cpu_threads, device_id=settings.device_id,
        seed=0, prefetch_queue_depth=settings.prefetch, exec_dynamic=True,
    )  # fmt: skip
    return _iterator(pipe, 1)


def decoder(device_id: int | None, decoding: Decoding) -> Any:
    """A pipeline that decodes one image, fed as `encoded` (uint8 `[length]`)."""
    pipe = dali.pipeline_def(lambda: decode(fn.external_source(name="encoded"), decoding))(
        batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True
    )
    pipe.build()
    return pipe


def release() -> None:
    """Give GPU memory that no pipeline uses any more back to the device."""
    dali.backend.ReleaseUnusedMemory()


def _iterator(pipe: Any, views: int) -> Any:
    # With the dynamic executor the tensors are DALI's own buffers, a new set for each batch.
    # Another executor would write over the buffers of a batch that is still in use.
    assert pipe.exec_dynamic
    names = [*(f"view{i}" for i in range(views)), "ids"]
    return dali_torch.DALIGenericIterator([pipe], names, prepare_first_batch=False)


def try_recipe(view: View, settings: LoaderSettings, dtype: str) -> None:
    """Make a view of two gray images by its recipe from outside; raises `ConfigError`."""

    def source(info: Any) -> Any:
        return [np.full((72, 64, channels), 128, dtype)] * 2, np.zeros((2, 1), np.int64)

    channels = len(settings.form.mean)
    reading = functools.partial(read, source, False, settings.decoding, dtype)
    with refused(f"data.views: the recipe {view.function}"):
        try:
            pipe = train_iterator(
                reading, Augmentation([view], "seq"), settings, seed=1, batch_size=2
            )
            shape = list(next(pipe)[0]["view0"].shape)
        except Exception as error:
            raise ValueError(recipes.mistake(view.function, error)) from error
        wanted = [view.size, view.size, channels]
        if shape[1:] != wanted:
            raise ValueError(f"it gives images of {shape[1:]}; {wanted} are accepted")


# --- graphs --------------------------------------------------------------------------------------


def _train_graph(reading: Reading, views: Sequence[Callable[[Node], Node]]) -> Any:
    images, ids = reading()
    return (*[make(images) for make in views], ids)


def _maker(view: View, color_jitter: str, form: PixelFormat, key: Key) -> Callable[[Node], Node]:
    """What makes a view of the images: `augment`, or the view's own function."""
    if not view.function:
        return functools.partial(augment, view=view, color_jitter=color_jitter, form=form, key=key)
    seed = functools.partial(recipes.seed_of, key)
    function = functools.partial(recipes.load_recipe(view.function), view=view, seed=seed)
    return lambda images: normalize(function(images), form)


def _eval_graph(reading: Reading, crop: CentralCrop, form: PixelFormat) -> Any:
    images, ids = reading()
    return normalize(central_crop(images, crop), form), ids


def read(
    source: Callback, encoded: bool, decoding: Decoding, dtype: str = "uint8"
) -> tuple[Node, Node]:
    """RGB images, uint8 HWC, on the pipeline's device, and their ids `[1]`.

    `source` gives, for a `BatchInfo`, the batch's encoded images (a list of uint8 arrays; with
    `encoded`) or pixels (`[n, H, W, C]`), and its ids `[n, 1]`. Pixels of another `dtype` than
    uint8 become float32.
    """
    data, ids = fn.external_source(
        source=source,
        num_outputs=2,
        batch=True,
        batch_info=True,
        dtype=[getattr(types, dtype.upper().removesuffix("32")), types.INT64],
        ndim=[1 if encoded else 3, 1],
        layout=["" if encoded else "HWC", ""],
    )
    if encoded:
        return decode(data, decoding), ids
    data = data.gpu() if dali.Pipeline.current().device_id is not None else data
    return (data if dtype == "uint8" else to_float(data)), ids


def decode(encoded: Node, decoding: Decoding) -> Node:
    """RGB, uint8 HWC. EXIF orientation is left alone, as PIL and torchvision do."""
    common: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if dali.Pipeline.current().device_id is None:
        return fn.decoders.image(encoded, device="cpu", **common)
    if decoding.preallocate is not None:
        width, height = decoding.preallocate
        common |= {"preallocate_width_hint": width, "preallocate_height_hint": height}
    return fn.decoders.image(
        encoded,
        device="mixed",
        hw_decoder_load=decoding.hw_load,
        jpeg_fancy_upsampling=True,  # chroma as on the CPU
        **common,
    )


def augment(
    images: Node,
    view: View,
    color_jitter: str,
    form: PixelFormat,
    key: Key,
) -> Node:
    """One random view, HWC. `key` makes the operators' seeds."""
    # Parameters are drawn for every image. Drawn inside the conditionals, they would depend on the
    # coins of the other images.
    x = turned(random_crop(images, view, hashed(*key, "crop")), view, key)
    if view.jitter_p > 0 or view.gray_p > 0:
        gray = len(form.mean) == 1
        x = recolor(fn.cat(x, x, x, axis=2) if gray else x, view, color_jitter, key)
        x = x[:, :, 0:1] if gray else x
    elif view.blur_p > 0 or view.solarize_p > 0:
        x = to_float(x)
    if view.blur_p > 0:
        sigma = uniform(*view.blur_sigma, hashed(*key, "sigma"))
        if coin(view.blur_p, hashed(*key, "blur")):
            x = blur(x, sigma)
    if view.solarize_p > 0:  # noqa: SIM102 (the inner condition is the graph's)
        if coin(view.solarize_p, hashed(*key, "solarize")):
            x = solarize(x)
    flip = fn.random.coin_flip(probability=view.flip_p, seed=hashed(*key, "flip"))
    return normalize(x, form, flip)


def recolor(x: Node, view: View, mode: str, key: Key) -> Node:
    """Random jitter, then random gray: uint8 to float32 in [0, 255].

    DALI's rounding to uint8 costs more on a CPU than most operators, so nothing is rounded from
    here on. A gray image is not tinted, because `tint` changes its luma only at clipped pixels.
    """
    draws = jitter_draws(view, key)
    order = uniform(0, len(JITTER_ORDERS), hashed(*key, "order"))
    jittered = coin(view.jitter_p, hashed(*key, "jitter"))
    gray = coin(view.gray_p, hashed(*key, "gray"))
    if jittered:
        x = light(x, mode, draws, order)
    if gray:
        x = to_float(grayscale(x))
    elif jittered:
        x = tint(x, mode, draws)
    else:
        x = to_float(x)
    return x


# --- random numbers ------------------------------------------------------------------------------


def coin(probability: float, seed: int) -> Node:
    return fn.random.coin_flip(probability=probability, seed=seed, dtype=types.BOOL)


def uniform(low: float, high: float, seed: int) -> Node:
    if low == high:  # DALI refuses an empty range
        high = float(np.nextafter(np.float32(low), np.float32(np.inf)))
    return fn.random.uniform(range=[float(low), float(high)], seed=seed)


def jitter_draws(view: View, key: Key) -> list[Node | None]:
    """Factors of brightness, contrast and saturation and the hue in turns; None for strength 0."""
    draws: list[Node | None] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        strength = getattr(view, name)
        low, high = max(0.0, 1 - strength), 1 + strength
        if name == "hue":
            low, high = -strength, strength
        draws.append(uniform(low, high, hashed(*key, name)) if strength > 0 else None)
    return draws


# --- operators: uint8 HWC to uint8 HWC unless a docstring says otherwise -------------------------


def random_crop(x: Node, view: View, seed: int) -> Node:
    """torchvision's RandomResizedCrop, bicubic and antialiased.

    After ten draws that do not fit in the image both take its largest part of an allowed aspect
    ratio: torchvision takes the central one, DALI a random one. Only long images differ.
    """
    return fn.random_resized_crop(
        x,
        size=(view.size, view.size),
        random_area=list(view.scale),
        random_aspect_ratio=list(view.ratio),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        seed=seed,
    )


def turned(x: Node, view: View, key: Key) -> Node:
    """Turned by `view.rotate`, then flipped vertically. Positive angles are counter-clockwise."""
    if view.rotate == QUARTERS:
        turns = fn.random.uniform(values=[0.0, 1.0, 2.0, 3.0], seed=hashed(*key, "rotate"))
        x = quarter_turns(x, turns)
    elif view.rotate > 0:
        angle = uniform(-view.rotate, view.rotate, hashed(*key, "rotate"))
        x = rotate(x, angle)
    if view.vertical_flip_p > 0:
        probability, seed = view.vertical_flip_p, hashed(*key, "vertical flip")
        flip = fn.random.coin_flip(probability=probability, seed=seed)
        x = fn.flip(x, horizontal=0, vertical=flip)
    return x


def rotate(x: Node, angle: Node) -> Node:
    """Turned by degrees, bilinear; beyond the border its pixels are repeated."""
    return fn.rotate(x, angle=angle, keep_size=True, interp_type=types.INTERP_LINEAR)


def quarter_turns(x: Node, turns: Node) -> Node:
    """Turned `turns` (0 to 3) times by 90 degrees: a transposition and flips."""
    if turns == 1.0 or turns == 3.0:
        x = fn.transpose(x, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
    horizontal, vertical = turns >= 2.0, (turns == 1.0) | (turns == 2.0)
    as_number = {"dtype": types.INT32}
    return fn.flip(
        x,
        horizontal=fn.cast(horizontal, **as_number),
        vertical=fn.cast(vertical, **as_number),
    )


def central_crop(x: Node, crop: CentralCrop) -> Node:
    """The shorter side to `crop.resize`, antialiased; then the central `crop.size` squared.

    The longer side is rounded down and the crop's place to even, as in torchvision.
    """
    shape = fn.cast(x.shape(), dtype=types.FLOAT)
    height, width = shape[0], shape[1]
    shorter = dmath.min(height, width)
    height, width = (dmath.floor(side * float(crop.resize) / shorter) for side in (height, width))
    new = fn.stack(height, width)
    kernel = types.INTERP_LINEAR if crop.interpolation == "bilinear" else types.INTERP_CUBIC
    x = fn.resize(x, size=new, interp_type=kernel, antialias=True)
    start = fn.stack(half(height - crop.size), half(width - crop.size))
    # A size among the inputs would be a constant on the GPU; DALI copies it back and waits for it.
    return fn.slice(x, start=fn.cast(start, dtype=types.INT32), shape=[crop.size] * 2, axes=[0, 1])


def half(n: Node) -> Node:
    """n / 2 of a whole number, ties to even, as Python's `round`."""
    odd = n - 2.0 * dmath.floor(n / 2.0)
    return (1.0 - odd) * n / 2.0 + odd * 2.0 * dmath.floor(n / 4.0 + 0.5)


# torchvision's ColorJitter is `light`, then `tint`; `mode` as in the config.


def light(x: Node, mode: str, draws: Sequence[Node | None], order: Node) -> Node:
    """Brightness and contrast; with `exact` all four operators, in the `order` in [0, 24)."""
    b, c, s, h = draws
    if mode == "fast":
        given = {"brightness": b, "contrast": c}
        given = {name: value for name, value in given.items() if value is not None}
        return fn.brightness_contrast(x, **given) if given else x
    if mode == "seq":
        if b is not None:
            x = brightness(x, b)
        if c is not None:
            x = contrast(x, c)
        return x
    assert mode == "exact"
    row = fn.cast(dmath.floor(order), dtype=types.INT32)
    orders = types.Constant(JITTER_ORDERS)
    for place in range(4):
        operator = orders[row, place]
        if operator == 0:
            x = brightness(x, b) if b is not None else x
        elif operator == 1:
            x = contrast(x, c) if c is not None else x
        elif operator == 2:
            x = saturation(x, s) if s is not None else x
        else:
            x = hue(x, h) if h is not None else x
    return x


def tint(x: Node, mode: str, draws: Sequence[Node | None]) -> Node:
    """Saturation and hue, unless `exact`: uint8 to float32."""
    _, _, s, h = draws
    given = {}
    if s is not None:
        given["saturation"] = s
    if h is not None:
        given["hue"] = h * 360.0
    if mode == "exact" or not given:
        return to_float(x)
    return clamp(fn.hsv(x, dtype=types.FLOAT, **given), 255.0)


def brightness(x: Node, factor: Node) -> Node:
    return fn.brightness_contrast(x, brightness=factor)


def contrast(x: Node, factor: Node) -> Node:
    """About the mean of the gray image, as torchvision, not about 128."""
    gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    if x.device == "gpu":
        # `contrast_center` must be on the CPU: arithmetic leaves the mean where it is.
        mean, factor = fn.reductions.mean(gray, keep_dims=True), factor.gpu()
        return to_uint8(x * factor + mean * (1.0 - factor))
    mean = fn.reductions.mean(gray)
    return fn.brightness_contrast(x, contrast=factor, contrast_center=mean)


def saturation(x: Node, factor: Node) -> Node:
    return fn.hsv(x, saturation=factor)


def hue(x: Node, turns: Node) -> Node:
    """torchvision's rotation in HSV's hexagon; `fn.hsv` rotates linearly about the gray axis."""
    if x.device == "gpu":
        turns = turns.gpu()
    f = fn.cast(x, dtype=types.FLOAT)
    high = fn.reductions.max(f, axes=[2], keep_dims=True)
    chroma = high - fn.reductions.min(f, axes=[2], keep_dims=True)
    r, g, b = f[:, :, 0:1], f[:, :, 1:2], f[:, :, 2:3]
    red = fn.cast(high == r, dtype=types.FLOAT)
    green = fn.cast(high == g, dtype=types.FLOAT) * (1.0 - red)
    blue = 1.0 - red - green
    inverse = 1.0 / (chroma + fn.cast(chroma == 0, dtype=types.FLOAT))
    sixths = red * (g - b) + green * (b - r) + blue * (r - g)
    sixths = sixths * inverse + green * 2.0 + blue * 4.0 + turns * 6.0
    # Channel = V - C clamp(min(k, 4 - k), 0, 1) with k = (n + H) mod 6, n = 5, 3, 1 for R, G, B.
    n = types.Constant(np.array([[[5.0, 3.0, 1.0]]], np.float32), device=x.device)
    k = sixths + n + 12.0
    k = k - dmath.floor(k / 6.0) * 6.0
    return to_uint8(high - chroma * clamp(dmath.min(k, 4.0 - k), 1.0))


def grayscale(x: Node) -> Node:
    """PIL's luma, three times."""
    gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)


def blur(x: Node, sigma: Node) -> Node:
    """Gaussian with a window of 2 ceil(3 sigma) + 1, which is half the cost of a fixed 23."""
    return fn.gaussian_blur(x, sigma=sigma)


def solarize(x: Node) -> Node:
    """Invert from 128 on: x where it is less than 255 - x."""
    return dmath.min(x, 255.0 - x)


def normalize(x: Node, form: PixelFormat, mirror: Node | int = 0) -> Node:
    """HWC: mirrored, less the mean, over the standard deviation."""
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT16 if form.half else types.FLOAT,
        output_layout="HWC",
        mean=[form.unit * m for m in form.mean],
        std=[form.unit * s for s in form.std],
        mirror=mirror,
    )


def to_uint8(x: Node) -> Node:
    return fn.cast(clamp(x, 255.0), dtype=types.UINT8)


def to_float(x: Node) -> Node:
    return fn.cast(x, dtype=types.FLOAT)


def clamp(x: Node, high: float) -> Node:
    """To [0, high]; a quarter of the cost of `dali.math.clamp` on a CPU."""
    return dmath.max(dmath.min(x, high), 0.0)
