"""Settings with which a method uses all its state within a few small steps."""

from __future__ import annotations

# With these a method uses all its state within five steps of twelve images.
SETTINGS: dict[str, tuple[str, ...]] = {
    "adadim": ("method.alpha_every=1", "method.beta_scale=0.1"),
    "deepclusterv2": ("method.prototypes=[5, 3, 4]",),
    "dino": (
        "method.prototypes=9",
        "method.warmup_teacher_temperature=0.04",
        "method.teacher_temperature=0.07",
        "method.warmup_teacher_epochs=2",
    ),
    "lejepa": ("method.slices=16", "optim.name=lars"),
    "mocov2plus": ("method.queue_size=31",),  # goes round in the middle of a batch
    "nnclr": ("method.queue_size=31",),
    "ressl": ("method.queue_size=31",),
    "swav": (
        "method.prototypes=7",
        "method.epsilon=0.05",
        "method.queue_size=17",
        "method.queue_epoch=0",
    ),
}
