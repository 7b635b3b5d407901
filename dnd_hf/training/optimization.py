"""Optimizer groups, and the moving average of the weights, sharded or not."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups in which matrices (and embeddings) decay; biases and gains of norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that FSDP has sharded; then all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WeightAverage(EMAModel):
    """EMAModel in float32, also of weights that FSDP has sharded; its state holds whole tensors.

    Args:
        parameters: the weights, of any dtype.
        decay: in [0, 1).
    """

    shadow_params: list[Tensor]

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        super().__init__([parameter.detach().float() for parameter in parameters], decay, foreach=True)

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state | {"shadow_params": [whole_tensor(average) for average in state["shadow_params"]]}

    def load_state_dict(self, state_dict: dict) -> None:
        places = [(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in self.shadow_params]
        devices = [average.device for average in self.shadow_params]
        super().load_state_dict(state_dict)
        self.shadow_params = [average.to(device) for average, device in zip(self.shadow_params, devices)]
        self.shadow_params = [
            distribute_tensor(average, *place) if place else average
            for average, place in zip(self.shadow_params, places)
        ]


@contextmanager
def averaged_weights(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """Inside, `model` holds the averaged parameters, is in evaluation mode, and keeps its own buffers."""
    was_training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train(was_training)
