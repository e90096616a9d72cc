"""Can the network be stored at all? Found out before the first epoch, not after the last."""

from common.errors import UserError


def check_export(network, input_example):
    """Raise UserError unless MLflow can store `network`, which it exports after the training.

    `network` is on the CPU, `input_example` a numpy array with a batch of at least 2. One that
    cannot be exported would train to the end and then be lost. Takes 1 to 2 s.
    """
    import torch

    example = torch.from_numpy(input_example)
    training, name = network.training, type(network).__name__
    try:
        with torch.inference_mode():
            outputs = network.eval()(example)
        if not isinstance(outputs, torch.Tensor):
            raise TypeError(f"it returns a {type(outputs).__name__} in place of one tensor")
        # As `mlflow.pytorch.log_model` does it: any batch size, from the CPU, in eval mode.
        sizes = ({0: torch.export.Dim.AUTO},)
        torch.export.export(network, (example,), dynamic_shapes=sizes)
    except (RuntimeError, TypeError, ValueError) as error:  # PyTorch's own are among these
        reason = str(error).strip().splitlines()[0][:200]
        what = f"the network {name} cannot be exported, so MLflow could not store it: {reason}"
        hint = (
            "`forward` takes one tensor of that type, returns one, and does not decide by values: "
        )
        raise UserError(what, f"{hint}docs/adapt.md has more.") from error
    finally:
        network.train(training)
