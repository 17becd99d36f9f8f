"""How many kernels a GPU is asked for in one step of the toy's training, by part: PyTorch's calls
that are not views, counted on a CPU, with the optimiser as it is on a GPU (a call of `foreach`
counts as one).

    python tests/bench/launches.py
"""
import collections
from pathlib import Path
from types import SimpleNamespace

import study                    # noqa: F401 (it puts the project on the path)
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import fudoki
import train

VIEWS = set("""view _unsafe_view t transpose permute expand slice select unsqueeze squeeze split
    split_with_sizes unbind alias detach as_strided chunk empty empty_like new_empty lift_fresh
    _local_scalar_dense""".split())


class Launches(TorchDispatchMode):
    """Counts the calls while it is entered."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def of_step():
    """{part: number of launches} of a step of the toy's training, after a first one."""
    torch.manual_seed(0)
    texts = train.Digits.examples + ["what digit? one", "is bold? no"]
    model = fudoki.Fudoki({"text": [train.tokenizer(texts), 4],
                           "image": [torch.rand(256, 16), 4, 28]},
                          optimizer="muon", drop=0.).train()
    model.log_dict = lambda *args, **kwargs: None
    model.trainer = SimpleNamespace(estimated_stepping_batches=100)
    optimizer, = model.configure_optimizers()[0]
    for group in optimizer.param_groups:
        group["foreach"] = True
    run = train.parse(["--accelerator", "cpu"])
    train.quietly(run)
    trainer = train.make_trainer(run, train.Keep(run, Path(), None))
    callback, = (c for c in trainer.callbacks if isinstance(c, WeightAveraging))
    mean, counted = AveragedModel(model, **callback._kwargs), {}
    x = dict(text=torch.randint(10, (64, 4)), image=torch.randint(256, (64, 49)))

    for _ in range(3):                          # averaging begins with the second
        optimizer.zero_grad()
        with Launches() as counted["forward"]:
            loss = model.training_step(x, 0)
        with Launches() as counted["backward"]:
            loss.backward()
        with Launches() as counted["clipping"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        with Launches() as counted["optimiser"]:
            optimizer.step()
        with Launches() as counted["average of the weights"]:
            mean.update_parameters(model)
    return {part: sum(launches.found.values()) for part, launches in counted.items()}


if __name__ == "__main__":
    counted = of_step()
    for part, number in (counted | {"all": sum(counted.values())}).items():
        print(f"{part:25}{number:5}")
