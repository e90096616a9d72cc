"""Can the network be stored at all? Found out before the first epoch, not after the last."""

from common.errors import UserError


def check_export(network, input_example):
    """Raise UserError unless MLflow can store `network`, which it exports after the training.

    `network` is on the CPU, `input_example` a numpy array with a batch of at least 2. A network
    that cannot be exported (its `forward` decides by the values in a tensor, say) would train to
    the end and then be lost. Takes 1 to 2 s, most of which the export at the end then saves.
    """
    import torch

    example = torch.from_numpy(input_example)
    state = network.training
    try:
        # As `mlflow.pytorch.log_model` does it: any batch size, from the CPU, in eval mode.
        torch.export.export(
            network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
    except (RuntimeError, ValueError) as error:  # PyTorch's own are all of these
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the network {type(network).__name__} cannot be exported, so MLflow could not store "
            f"it after the training: {reason}",
            "decide by shapes, not by values, in `forward` (torch.where, torch.cond); "
            "torch.export.export(network, (example,)) shows the line.",
        ) from error
    finally:
        network.train(state)
