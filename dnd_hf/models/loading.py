"""How the models of this package are loaded, beyond what their libraries do: whole, or not at all."""

import torch


class LoadingMixin:
    """For a model of transformers or diffusers, before its other base classes."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ):
        """As in the library, but a checkpoint that lacks weights, or has others of a wrong shape, is refused.

        Args:
            ignore_mismatched_sizes: weights of a wrong shape are left out, to be trained anew.
            dtype: `None` means float32. diffusers passes it for each model of a pipeline where the caller asks for
                nothing. transformers' own default, the precision in which the weights are stored, is that of a call
                without this argument.

        Raises:
            ValueError: weights are missing or misshapen; the message names them.
        """
        if any(name in kwargs and kwargs[name] is None for name in ("dtype", "torch_dtype")):
            kwargs = {name: value for name, value in kwargs.items() if name != "torch_dtype"}
            kwargs["dtype"] = torch.float32
        model, info = super().from_pretrained(  # type: ignore[misc] # of the library's class, which comes after this
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
        if not ignore_mismatched_sizes:
            faults += [
                f"{name} has shape {tuple(found)} instead of {tuple(expected)}"
                for name, found, expected in sorted(info["mismatched_keys"])
            ]
        if faults:
            listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold the weights of its {cls.__name__}: {listed}."
            )
        vars(model.config).pop("auto_map", None)  # names code that lies there, not where this model will be saved
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: the code that `auto_map` names is written with a pipeline, and is not this module's file."""
