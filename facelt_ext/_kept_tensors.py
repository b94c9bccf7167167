"""Modules with tensors that are neither parameters nor buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from facelt_ext._checks import check_tensor


class KeepsTensors(nn.Module):
    """A module with tensors that nothing else may compute with: indices, and margins.

    Buffers are averaged (torch.optim.swa_utils.AveragedModel), cast (Module.type, the buffer_dtype
    of FSDP) and replaced by empty memory (Module.to_empty), after which an index points elsewhere.
    So these tensors are plain attributes. They follow the module to every device but "meta", where
    they would lose their values. `state_dict()` has copies of them, under the names that buffers
    would have, and what `load_state_dict` finds there is checked before anything is taken over.

    `_moved` names the attributes that follow the module, `_saved` those that are in the state_dict
    and whether it must have them. One that is not a tensor at the moment is neither.
    """

    _moved: tuple[str, ...] = ()
    _saved: dict[str, bool] = {}

    def __setattr__(self, name, value):
        if name not in self._saved or not isinstance(value, nn.Parameter):
            return super().__setattr__(name, value)
        # transformers makes a parameter of whatever it loads, and leaves this mark on it.
        if value.requires_grad and not hasattr(value, "_is_hf_initialized"):
            raise ValueError(f"{name}: no gradient goes to it; expected {name}.detach()")
        self._take({name: self._checked_value(name, value.detach())}, True)

    def _checked_value(self, name: str, value: Tensor) -> Tensor:
        """A value for the attribute `name` out of a state_dict, or an error that names it."""
        raise NotImplementedError

    def _keep_where(self, weight: Tensor) -> None:
        """On the device of the module's own weight."""
        for module in self.modules():
            for name in getattr(module, "_moved", ()):
                value = getattr(module, name, None)
                if isinstance(value, Tensor) and not value.is_meta:
                    module._kept_on(name, weight.device)

    def _kept_on(self, name: str, device: torch.device) -> Tensor:
        """The tensor on `device`. FSDP moves parameters and buffers alone: then this does."""
        value = getattr(self, name)
        if value.device == device:
            return value
        if value.is_meta:
            raise ValueError(f"{name}: was made on meta and has no values; load_state_dict() has")
        # A backward may save it, which it could not if it were made in inference mode.
        with torch.inference_mode(False):
            value = value.to(device)
        if device.type != "meta":
            setattr(self, name, value)
        return value

    def _kept_tensors(self) -> dict[str, Tensor]:
        """Those that are saved."""
        values = {name: getattr(self, name) for name in self._saved}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _checked_state(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """What of a state_dict is to be taken over, by attribute."""
        return {
            name: self._checked_value(name, state_dict[prefix + name])
            for name in self._saved
            if prefix + name in state_dict
        }

    def _take(self, values: dict[str, Tensor], assign: bool) -> None:
        """Takes over what was checked: on the own device, or with `assign` on the values'."""
        for name, value in values.items():
            own = getattr(self, name)
            keep = isinstance(own, Tensor) and not own.is_meta and not assign
            device = own.device if keep else value.device
            with torch.inference_mode(False):
                setattr(self, name, value.detach().to(device, copy=True))

    def named_buffers(self, prefix="", recurse=True, remove_duplicate=True):
        """With recurse=False also copies of what is saved here: torch.distributed.checkpoint and
        other loaders ask for names in this way, and nothing that averages, casts or empties.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            for name, value in self._kept_tensors().items():
                yield f"{prefix}.{name}" if prefix else name, value.clone()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in self._moved:
            value = getattr(self, name)
            if isinstance(value, Tensor) and not value.is_meta:
                device = fn(value.new_empty(0)).device
                if device.type != "meta":
                    setattr(self, name, value.to(device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._kept_tensors().items():
            destination[prefix + name] = value.clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        taken = self._checked_state(state_dict, prefix)
        for name in taken:
            del state_dict[prefix + name]
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict:
            needed = [name for name, required in self._saved.items() if required]
            missing_keys += [prefix + name for name in needed if name not in taken]
        if len(error_msgs) == errors:
            self._take(taken, local_metadata.get("assign_to_params_buffers", False))


def check_saved_integers(value: Tensor, name: str, *shape: int) -> Tensor:
    """int64 of this shape. Of another dtype, numbers may have been rounded on the way."""
    value = check_tensor(value, name)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64 in the state_dict, got {value.dtype}")
    return check_saved_shape(value, name, *shape)


def check_saved_shape(value: Tensor, name: str, *shape: int) -> Tensor:
    if list(value.shape) != list(shape):
        raise ValueError(
            f"{name}: expected shape {list(shape)} in the state_dict, got {list(value.shape)}"
        )
    if value.is_meta:
        raise ValueError(f"{name}: expected values in the state_dict, got a tensor on meta")
    return value
