# A pinned set as an image, for Docker and, with Pyxis, for Slurm.
#
#   build         docker build -t ddp_ssl .            (driver of CUDA 12: --build-arg PINS=cuda12)
#   one machine   docker run --gpus all --ipc=host -v /data:/data -v "$PWD/runs:/runs" ddp_ssl \
#                   torchrun --nproc_per_node 8 -m ddp_ssl.train data.root=/data run.dir=/runs/first
#   Slurm         enroot import -o ddp_ssl.sqsh dockerd://ddp_ssl
#                 CONTAINER=$PWD/ddp_ssl.sqsh CONTAINER_MOUNTS=/data \
#                   sbatch --nodes=2 --gpus-per-node=8 slurm/imagenet100_adadim.sh data.root=/data/imagenet
#
# The CUDA libraries come with torch's wheels; the host gives the driver. Under Slurm the code that
# runs is the checkout's, which slurm/run.sh mounts, not the image's copy.
FROM python:3.11-slim-bookworm

ARG PINS=cuda13
# What the NVIDIA runtime lends the container; "video" is for DALI's hardware decoders.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/ddp_ssl
COPY setup.py pyproject.toml constraints.txt constraints-cuda12.txt README.md ./
COPY ddp_ssl ddp_ssl
COPY configs configs
# A C compiler for torch.compile, git for the commit that a run notes.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git \
    && rm -rf /var/lib/apt/lists/*
RUN case "$PINS" in cuda12) file=constraints-cuda12.txt ;; cuda13) file=constraints.txt ;; esac \
    && pip install -c "${file:?PINS: cuda12 or cuda13}" ".[$PINS]"
CMD ["python", "-m", "ddp_ssl.train", "--help"]
