"""Where scoring and fitting run."""

from __future__ import annotations

import pytest
import torch

from cswap_deploy.errors import DeviceError
from cswap_deploy.prune.batches import resolve_device


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        resolve_device("cuda")


def test_cuda_computes_in_full_precision_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("allow_tf32", True), ("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    assert resolve_device("cpu") == "cpu" and torch.backends.cudnn.allow_tf32, "nothing is touched where it is not used"
    assert resolve_device("auto") == "cuda"
    found = torch.backends.cudnn
    assert (found.allow_tf32, found.deterministic, found.benchmark) == (False, True, False)
