"""Memory of a GPU that others than torch hold."""

import torch


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that torch does not hold: DALI, NCCL, CUDA itself, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
