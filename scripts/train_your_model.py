"""Train a model of your own and track the run with MLflow: the base to copy and to change.

    python scripts/train_your_model.py
    python scripts/train_your_model.py --epochs 60 --register --alias production

As it stands, a perceptron predicts from ten measurements per patient how far diabetes goes within a
year; scikit-learn carries the table with it. Put your data, model and loss into the three marked
places, as docs/adapt.md shows. You will see one line per epoch, and a JSON object as the last line.
In the MLflow UI the run stands in the experiment diabetes, with its curves and its model. Needs
common/cli.py and the rooms connection and runs of common/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common/ is

from common import cli
from common.errors import UserError

EXPERIMENT = "diabetes"  # the group of runs that this one joins
MODEL_NAME = "DIABETES_MLP"  # the entry in the registry that gets a new version


# --- 1 of 3: your data ----------------------------------------------------------------------------
def load_data():
    """Return two torch data sets of (input, target): one to train on, and one held out."""
    import torch  # inside the functions, so that --help answers at once
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)  # 442 rows; ten columns: age, sex, blood pressure ...
    inputs = torch.tensor(table.data, dtype=torch.float32)
    targets = torch.tensor(table.target, dtype=torch.float32)
    rows = torch.utils.data.TensorDataset(inputs, targets)
    split = torch.Generator().manual_seed(0)  # always the same, so that runs can be compared
    return torch.utils.data.random_split(rows, [0.8, 0.2], split)


# --- 2 of 3: your model ---------------------------------------------------------------------------
def build_network(train):
    """Return the network. It takes raw inputs: whoever loads it need not know how to scale them."""
    import torch
    from torch import nn

    inputs = torch.stack([row for row, _ in train])

    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", inputs.mean(0))  # stored with the weights
            self.register_buffer("std", inputs.std(0))
            self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x):
            x = self.layers((x - self.mean) / self.std)
            return 100 * x.squeeze(1)  # the targets are some 25 to 350

    return Perceptron()


# --- 3 of 3: your loss, and the scores that the model is judged by --------------------------------
def loss(outputs, targets):
    """Return the mean over the batch of what the training makes small."""
    return (outputs - targets).square().mean()


def scores(outputs, targets):
    """Return metrics, each one number, for the data that is held out, all of it at once."""
    return {"val_loss": loss(outputs, targets), "val_error": (outputs - targets).abs().mean()}


# --- From here on, nothing has to be changed ------------------------------------------------------
def build_parser():
    parser, shown = cli.parser(__doc__), "(default: %(default)s)"
    register = f"register the model as {MODEL_NAME} (default: only track)"
    add = parser.add_argument
    add("--batch_size", type=cli.whole_number(1), default=32, help=f"inputs per step {shown}")
    add("--epochs", type=cli.whole_number(1), default=20, help=f"passes over the data {shown}")
    add("--lr", type=cli.learning_rate, default=0.003, help=f"learning rate of Adam {shown}")
    add("--seed", type=cli.whole_number(0), default=0, help=f"of weights and input order {shown}")
    add("--register", action="store_true", help=register)
    add("--alias", type=cli.alias, help="alias to point at the new version (default: none)")
    cli.add_server_arguments(parser, EXPERIMENT)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.alias and not args.register:
        parser.error("--alias needs --register")

    cli.say_imports()  # they take seconds, and wait here so that --help answers at once
    from importlib import metadata

    import mlflow
    import torch

    from common import connection, runs

    # 1. Connect, and load the data: whatever is wrong shows now, not after an epoch.
    connection.connect(args.tracking_uri, args.ca_bundle, args.experiment, args.workspace)
    train, held_out = load_data()
    torch.manual_seed(args.seed)
    network = build_network(train)
    # A batch of two, because a model exported with a batch of one takes no other; a numpy array,
    # because a model with a tensor as its example cannot be served.
    example = torch.stack([train[0][0], train[1][0]]).numpy()
    runs.check_export(network, example)  # can it be stored?
    # set_experiment: the run joins the others of this experiment, on the left in the UI.
    experiment = mlflow.set_experiment(args.experiment)
    runs.check_place(experiment, network)  # can files be written there?

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    network = network.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    batches = torch.utils.data.DataLoader(train, args.batch_size, shuffle=True)

    # 2. Train and track. start_run: the run's page; leaving the `with` block ends the run.
    with mlflow.start_run(experiment_id=experiment.experiment_id) as run, runs.always_ended():
        run_id = run.info.run_id
        print(f"run      {run_id}  {runs.run_address(run)}", flush=True)
        print(f"device   {device.type}", flush=True)
        # set_tags: words to find the run by, in the search bar and on its page.
        tags = {"owner": runs.user(), "model.class": type(network).__name__}
        mlflow.set_tags({**tags, **runs.git_tags(__file__), **runs.job_tags()})
        # log_params: what was set before training; the columns to compare runs by.
        names = ("batch_size", "epochs", "lr", "seed")
        mlflow.log_params({name: getattr(args, name) for name in names})

        for epoch in range(1, args.epochs + 1):
            network.train()
            total = 0
            for inputs, targets in batches:
                optimizer.zero_grad()
                value = loss(network(inputs.to(device)), targets.to(device))
                value.backward()
                optimizer.step()
                total += value.detach() * len(inputs)
            if not torch.isfinite(total):
                what = f"the training diverged: the mean loss is {total / len(train)}."
                raise UserError(what, "use a smaller --lr.")
            outputs, targets = predict(network.eval(), held_out, args.batch_size, device)
            metrics = {"train_loss": total / len(train), **scores(outputs, targets)}
            metrics = {name: float(metric) for name, metric in metrics.items()}
            # log_metrics: a point on each curve, in one request; tab "Model metrics".
            mlflow.log_metrics(metrics, step=epoch)
            words = "  ".join(f"{name} {metric:.4f}" for name, metric in metrics.items())
            print(f"epoch {epoch}/{args.epochs}  {words}", flush=True)

        # log_model: weights, signature and requirements, linked from the run's page and loadable
        # without this code; from the CPU, so that it loads on any machine. `2.14.1+cu130` names a
        # build that another machine may not have.
        packages = {name: metadata.version(name).split("+")[0] for name in ("torch", "numpy")}
        logged = mlflow.pytorch.log_model(
            network.cpu(),
            name="model",
            input_example=example,
            pip_requirements=[f"{name}=={version}" for name, version in packages.items()],
            step=args.epochs,
        )
    result = {"run_id": run_id, "model_uri": logged.model_uri, **metrics}

    # 3. Register and promote. (To compare a stored classifier with the trained one before, as
    # train_mnist_mlflow.py does, copy the room storage as well.)
    if args.register:
        # register_model: a new version under "Models", linked to the run.
        version = mlflow.register_model(logged.model_uri, MODEL_NAME).version
        result |= {"model_name": MODEL_NAME, "model_version": str(version)}
        print(f"model    {MODEL_NAME} version {version}", flush=True)
        if args.alias:
            before = runs.alias_version(MODEL_NAME, args.alias)
            # set_registered_model_alias: programs load the version that it points at.
            mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, args.alias, version)
            print(f"alias    {args.alias}  version {before or 'none'} -> {version}", flush=True)
            result |= {"alias": args.alias, "previous_version": before}
    cli.print_result(**result)


def predict(network, data, batch_size, device="cpu"):
    """Return the outputs and targets for all of `data`, on the CPU."""
    import torch

    batches = torch.utils.data.DataLoader(data, batch_size)
    with torch.inference_mode():
        pairs = [(network(inputs.to(device)).cpu(), targets) for inputs, targets in batches]
    return (torch.cat(column) for column in zip(*pairs, strict=True))


if __name__ == "__main__":
    cli.run(main)
