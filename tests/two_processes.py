"""Runs training stages, one after the other, in each of the processes that `accelerate launch` starts, on the CPU.

    accelerate launch --config_file train/accelerate/fsdp2.yaml ... tests/two_processes.py runs.json

`runs.json` holds a list of `[module, [argument, ...]]`. Arguments need `--use_cpu`.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

initialise = PartialState.__init__


def as_gpus(self, *args, **kwargs) -> None:
    """accelerate shards models on accelerators alone; gloo, FSDP and DeepSpeed work on a CPU as well."""
    initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            self.distributed_type = DistributedType.DEEPSPEED
        elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_gpus


def copy_killed(finished: str, killed: str) -> None:
    """Copies a finished run as it would be if it had been killed before its last checkpoint."""
    state = PartialState()
    if state.process_index == 0:
        last = max(Path(finished).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        shutil.copytree(finished, killed, ignore=shutil.ignore_patterns("config.json", last.name))
    state.wait_for_everyone()


if __name__ == "__main__":
    for module, arguments in json.loads(Path(sys.argv[1]).read_text()):
        if module == "copy":
            copy_killed(*arguments)
        else:
            importlib.import_module(module).main(arguments)
    import torch.distributed

    torch.distributed.destroy_process_group()
