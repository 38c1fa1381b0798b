"""DINO: the student's distribution over prototypes follows the teacher's."""

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, check_temperature


def dino(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    comm: Comm = ONE_PROCESS,
) -> Tensor:
    """Cross-entropy between views, the teacher's centred and sharpened.

        loss = mean over images and pairs of views of -sum_p P_t(p) log P_s(p)
        P_t = softmax((teacher - center) / teacher_temperature)
        P_s = softmax(student / student_temperature)

    A pair is one of the teacher's views and another of the student's.

    `student`: logits `[v, n, P]` of the views and images held here (`[V_s, N, P]` in one process).
    `teacher`: logits `[V_t, n, P]` of all the teacher's views of these images, without gradient;
    they are the first V_t of the student's. `center`: `[P]`. Returns a scalar in float32 or float64
    whose mean over processes is the global loss. Raises `ValueError` for other shapes, for a single
    view and unless both temperatures are positive.

    Source: Caron et al. 2021, Eq. 2 and 3.
    """
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            "dino: expected student [V_s, N, P] and teacher [V_t, N, P], got "
            f"{list(student.shape)} and {list(teacher.shape)}"
        )
    check_temperature(
        "dino",
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    held = range(student.shape[0] * comm.view_shards)[comm.views]
    pairs = sum(len(teacher) - (view < len(teacher)) for view in held)
    if pairs == 0:
        raise ValueError("dino: one view has no other to compare with; needs 2 views or more")
    with torch.autocast(student.device.type, enabled=False):
        teacher = at_least_float32(teacher).detach()
        targets = ((teacher - center) / teacher_temperature).softmax(2)
        log_p = (at_least_float32(student) / student_temperature).log_softmax(2)
        # All pairs of a view of the student's with one of the teacher's, less those with itself.
        own = targets[comm.views]
        total = (targets.sum(0) * log_p.sum(0)).sum() - (own * log_p[: len(own)]).sum()
        return total / (-pairs * student.shape[1])
