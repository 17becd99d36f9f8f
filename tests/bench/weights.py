"""Makes the models that come along, tests/weights/*.ckpt, from checkpoints of train.py (seconds):

    python tests/bench/weights.py runs/toy/model.ckpt runs/scenes/model.ckpt

What stays are the averaged weights of the network, in float16, the path's clock and the codebook
as they are, and the settings of the run; the optimiser's state goes.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402


def small(saved):
    """What is needed to open and to score a checkpoint."""
    state = {name: value.half() if name.startswith("net.") else value
             for name, value in saved["state_dict"].items()}
    return dict(state_dict=state, hyper_parameters=saved["hyper_parameters"],
                callbacks=dict(Keep=saved["callbacks"]["Keep"]), global_step=saved["global_step"])


if __name__ == "__main__":
    for file in sys.argv[1:]:
        kept = small(sample.opened(file))
        path = ROOT / f"tests/weights/{kept['hyper_parameters']['notes']['preset']}.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save(kept, path)
        print(f"{path.name}: {kept['global_step']} steps, {path.stat().st_size / 1e6:.2f} MB")
