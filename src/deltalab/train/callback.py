"""A model adapted by deltalab in the training loop of others: transformers.Trainer and what is made from it.

    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[dl.TrainerCallback()])

What the Trainer does not know about an adapter, the callback does: schedules and penalties of methods that have them, and
checkpoints that hold the adapter alone.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from deltalab.core.errors import UserError
from deltalab.core.files import replacing
from deltalab.deltas.attach import Adapted
from deltalab.deltas.peft_format import save_adapter, trained_state, write_adapter
from deltalab.deltas.save import save_whole
from deltalab.deltas.schedule import adapted_in, penalty, step
from deltalab.deltas.weights import is_adapted

STATE = "model.safetensors"
"""The file that the Trainer loads a checkpoint's model from."""


class TrainerCallback(transformers.TrainerCallback):
    """Drives an adapted model in `transformers.Trainer`, TRL's `SFTTrainer` and other subclasses.

    After each optimizer step it calls `dl.step` with the Trainer's own count and number of steps. The gradient of
    `dl.penalty` is there before the first piece of a batch adds its own: it counts once a step, whatever is accumulated
    over pieces or averaged over processes, and it is part of what is clipped; the loss that is logged stays without it.

    From now on `model.save_pretrained` writes the adapter, so that `trainer.save_model` and checkpoints do. A
    checkpoint is a folder for `dl.load_adapter`; beside it `model.safetensors` holds everything that training changes,
    which is what `resume_from_checkpoint` and `load_best_model_at_end` put back. A resumed run ends with the bits of one
    that was not stopped, as far as the Trainer's own data order and generators allow. A checkpoint of another adapter is
    refused.

    Raises: UserError if the model has no adapter when training begins, or the trainer computes the output layer in a way
    that passes by the delta on it.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before a checkpoint is loaded, if there is a model by now."""
        model = given.get("model")
        if model is not None and is_adapted(model):
            _install(model, training=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The adapter is there, and checkpoints will be of it."""
        _install(adapted_in(given["model"]), training=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The penalty's gradient, into gradients that are empty now."""
        model: nn.Module = given["model"]
        extra = penalty(model)
        if extra is None:
            return
        scaler = getattr(given.get("optimizer"), "scaler", None)  # of fp16: the optimizer will divide by its scale
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(extra * scaler.get_scale() if scaler else extra, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Whether the delta on the output layer, if there is one, has been part of the loss."""
        head = getattr(adapted_in(given["model"]), "get_output_embeddings", lambda: None)()
        if isinstance(head, Adapted) and any(p.grad is None for p in head.delta.parameters() if p.requires_grad):
            raise UserError(
                "this trainer computes the loss from the output layer's weight, without the delta on it.",
                next="adapt other linears, or use transformers.Trainer or deltalab.train",
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Schedules. In fp16 a step may have been left out, for gradients that are not finite."""
        if not getattr(given.get("optimizer"), "step_was_skipped", False):
            step(given["model"], state.global_step + 1, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """What is saved from now on is the result."""
        _install(adapted_in(given["model"]), training=False)


class SavesAdapter:
    """`save_pretrained` of an adapted model in a Trainer. It is copied and pickled with its model."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.model, self.training = model, training

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """The adapter, in training with everything that resuming needs; of a model without adapter, all of it.

        Raises: UserError as `save_adapter`, but for schedules that are on their way in training.
        """
        if not is_adapted(self.model):  # unloaded, or a merged copy
            save_whole(self.model, save_directory, is_main_process=is_main_process, **options)
        elif is_main_process and self.training:
            write_adapter(self.model, save_directory)
            state = {name: t.detach().cpu().contiguous() for name, t in trained_state(self.model).items()}
            with replacing(Path(save_directory) / STATE) as tmp:
                safetensors.torch.save_file(state, tmp, {"format": "pt"})
        elif is_main_process:
            save_adapter(self.model, save_directory)


def _install(model: nn.Module, *, training: bool) -> None:
    """Let an adapted model save its adapter, and load what it saved without a word about the base."""
    model.save_pretrained = SavesAdapter(model, training)  # type: ignore[assignment]
    if _whole not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(_whole)


def _whole(model: nn.Module, keys: Any) -> None:
    """After `load_state_dict`: a state without any of the base is an adapter's, and has to hold all of this one.

    Raises: UserError if it is another's.
    """
    trained: dict[str, Tensor] = trained_state(model) if is_adapted(model) else {}
    base = model.state_dict().keys() - trained.keys()
    if not trained or not base or not base <= set(keys.missing_keys):
        return
    lost = [name for name in keys.missing_keys if name in trained]
    if lost or keys.unexpected_keys:
        parts = [f"{len(names)} {word}, the first '{names[0]}'" for names, word in ((lost, "missing"), (keys.unexpected_keys, "not expected")) if names]  # fmt: skip
        raise UserError(
            f"the checkpoint is of another adapter: {'; '.join(parts)}.",
            next="adapt the model as it was when the checkpoint was written, or train into another output folder",
        )
    keys.missing_keys.clear()
