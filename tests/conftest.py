"""What all tests share: the project on the path, and threads that do not spin for each other."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest                                           # noqa: E402
import torch                                            # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def no_judge(monkeypatch):
    """Reports come from a judge that has learned nothing, which saves seconds."""
    import train
    monkeypatch.setattr(train.Judge, "fit", lambda judge, *data: judge)
