"""What TensorRT on a target is asked to build, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cswap_deploy.artifacts import InputSpec
from cswap_deploy.device.target import Target
from cswap_deploy.errors import DeviceError
from cswap_deploy.preprocess import INPUT
from cswap_deploy.recipe import EngineSettings

BUILD_S, WAIT_S = 7200.0, 600.0
"""Engines of transformers take the better part of an hour on a small board; another build may still run."""


@dataclass(frozen=True)
class Order:
    """How engines are built, whatever the file."""

    spec: InputSpec
    settings: EngineSettings
    dynamic_batch: bool

    @property
    def request(self) -> dict[str, Any]:
        """What the agent's `build` is told beside the model."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "input": {"name": INPUT, "shape": list(self.spec.shape)},
            "dynamic": self.dynamic_batch,
            "wait_s": WAIT_S,
        }

    def build(
        self, target: Target, model: Mapping[str, str], weights: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], str]:
        """The agent's answer and TensorRT's log. Files are as `Target.put` names them.

        `weights`: the file beside the model that holds them, where the engine is passing: it is only to be measured. Errors:
        DeviceError; `kind` is "engine" where TensorRT itself fails.
        """
        more = {"passing": True, "beside": [dict(weights)]} if weights else {}
        return target.ask_with_log(
            "build",
            BUILD_S,
            model=dict(model),
            **self.request,
            **more,
        )


def refused(error: DeviceError) -> bool:
    """Whether TensorRT cannot build this very file: another one may be built."""
    return error.kind == "engine"
