"""A progress bar that shows the losses."""

from transformers import ProgressCallback, Trainer


class LossBar(ProgressCallback):
    """transformers' bar with the parts of the loss behind it, instead of a line for each log. Evaluations are lines."""

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        if self.training_bar is None or not state.is_world_process_zero or not logs:
            return
        shown = {name: value for name, value in logs.items() if name not in _HIDDEN and "runtime" not in name}
        numbers = {
            name: f"{value:.3g}" for name, value in shown.items() if isinstance(value, float) and "_per_" not in name
        }
        if "loss" in logs:
            self.training_bar.set_postfix(numbers)
        elif any(name.startswith("eval_") for name in logs):
            words = ", ".join(f"{name} {value}" for name, value in numbers.items())
            self.training_bar.write(f"step {state.global_step}: {words}")


_HIDDEN = ("learning_rate", "epoch", "grad_norm", "total_flos")


def show_losses(trainer: Trainer) -> None:
    """Put the bar in the place of transformers' own, unless progress bars are switched off."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossBar())
