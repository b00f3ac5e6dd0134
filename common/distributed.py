"""One script as several processes, one per GPU, started by torchrun; alone, nothing changes.

    torchrun --standalone --nproc-per-node 2 train_teacher.py --data-dir my_parts
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST1:29500 \\
        train_teacher.py -b 96    # on each of two machines with one folder; under SLURM: srun -N 2

Process 0 alone prints, validates and writes, so all need to see the same folders. Gradients are
averaged by torch's DistributedDataParallel, over NCCL between GPUs and gloo between CPUs.

Batch norm: on GPUs its statistics are those of the whole batch (SyncBatchNorm), as in one process.
torch has that for GPUs only, so on CPUs each process uses its share's, and the running averages
are process 0's: a network with batch norm trains a little differently there, as with a smaller
batch. All other networks train as in one process, but for rounding; pictures that are mixed have
their partners among those of their process.
"""

import os
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel

from common.files import UserError, exclusive

PATIENCE = timedelta(days=2)  # while process 0 decodes or validates; one that dies ends all
GRACE = 5  # seconds for torchrun to notice that another process ended


def is_distributed():
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized()


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def rank():
    """The number of this process; 0 prints and writes."""
    return dist.get_rank() if is_distributed() else 0


@contextmanager
def processes():
    """Join the processes that torchrun started, until the script's main() ends.

    Prints of all but process 0 are dropped. A process with an error first waits a little, unless it
    is process 0 with a UserError: where that is told, or another process has died and this one only
    missed it, torchrun ends it meanwhile, and one error stands on the screen.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        with open(os.devnull, "w") as nowhere:
            with redirect_stdout(nowhere) if rank() else nullcontext():
                yield
                barrier()
    except Exception as error:
        if rank() or not isinstance(error, UserError):
            time.sleep(GRACE)
        raise
    dist.destroy_process_group()


def barrier():
    """Wait for all processes; on the CPU, since NCCL would keep a GPU busy with waiting."""
    mean(torch.zeros(1))


@contextmanager
def first_then_others():
    """Let process 0 through the block before the others: it downloads and decodes for all."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def hold(folder):
    """`files.exclusive`, taken by process 0 for all."""
    return nullcontext() if rank() else exclusive(folder)


def own_device(device):
    """The GPU of this process where there are several; any other device as it is."""
    if not is_distributed() or device.type != "cuda":
        return device
    wanted, present = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if wanted > present:
        raise UserError(f"{wanted} processes for {present} GPUs; use --nproc-per-node {present}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def check_batch(batch_size):
    """Raise a UserError for a batch that cannot be shared evenly, or is one picture a process."""
    if batch_size < 2 * world_size():
        raise UserError(
            f"--batch-size {batch_size}: batch normalisation needs two pictures at a time in each "
            f"process; use {2 * world_size()} or more"
        )
    if batch_size % world_size():
        near = max(1, round(batch_size / world_size())) * world_size()
        raise UserError(
            f"--batch-size {batch_size} is of all {world_size()} processes together and must be a "
            f"multiple of {world_size()}; {near} is one"
        )


def share(items):
    """This process's part of a sequence or array: every item has one owner."""
    return items[rank()::world_size()]


def parallel(model):
    """The network to train with: the model itself, or its DistributedDataParallel.

    Its parameters stay the model's own. On GPUs batch norms of the model are replaced.
    """
    if not is_distributed():
        return model
    device = next(model.parameters()).device
    if device.type == "cuda":
        convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def mean(tensor):
    """The mean of the processes' tensors, the same on all."""
    if is_distributed():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def label_weight(rows):
    """What to multiply the mean loss of this share's labelled pictures by.

    rows: of `losses.label_rows`, or mixed ones. Shares hold different numbers of labels; with n of
    the N and P processes it is P n / N, so that the mean over processes is the mean over labelled
    pictures. Below one label the mean is a sum already, and n counts as 1.
    """
    if not is_distributed():
        return 1.0
    own = rows.sum()
    return own.clamp(min=1) / mean(own.clone()).clamp(min=1 / world_size())


def reduce(array):
    """Add the processes' float32 arrays up in that of process 0, in place.

    Each place must be zero in all processes but one: as integers their sum keeps every bit.
    """
    if is_distributed():
        dist.reduce(torch.from_numpy(array).view(torch.int32), dst=0)
