"""Tables of the benchmarks. As a script it prints those of the measured results, as they are in the documentation.

python examples/benchmarks/tables.py
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results"
IMAGES = ("dtd10", "flowers5", "cifar10")
MOSAICS = ("dtd10", "flowers5")


def mean_and_deviation(values: pd.Series, digits: int) -> str:
    """Mean and standard deviation, the latter if there are several values."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def comparison_table(runs: pd.DataFrame, columns: list[str], digits: int = 3) -> pd.DataFrame:
    """One row for each method: means and standard deviations of its tests, what was chosen, and what it costs.

    Args:
        runs: one row for each training.
        columns: the measured ones to show.
        digits: of these columns.
    """
    tested = runs[runs["split"] == "test"].groupby("method", sort=False)
    first = tested.first()
    table = first["trainable_parameters"].map("{:,}".format).to_frame("trainable parameters")
    for column in columns:
        table[column] = tested[column].agg(mean_and_deviation, digits)
    table["learning rate"] = first["learning_rate"].map("{:.1e}".format)
    table["weight decay"] = first["weight_decay"].map("{:.1e}".format)
    table["GFLOPs / step"] = first["flops_per_step"].map(lambda flops: f"{flops / 1e9:.1f}")
    table["activations kept, MB"] = first["activation_megabytes"].map("{:.0f}".format)
    table["seconds"] = tested["seconds"].mean().map("{:.0f}".format)
    return table.rename(index="`{}`".format)


def images() -> pd.DataFrame:
    """Accuracies in per cent on three data sets, the best mean first; the costs are those on the first."""
    runs = {name: pd.read_csv(RESULTS / f"comparison_{name}.csv") for name in IMAGES}
    percent = {name: frame.assign(**{name: 100 * frame["accuracy"]}) for name, frame in runs.items()}
    tables = {name: comparison_table(frame, [name], digits=1) for name, frame in percent.items()}
    tested = [frame[frame["split"] == "test"].groupby("method")[name].mean() for name, frame in percent.items()]
    means = pd.concat(tested, axis=1).mean(axis=1).rename("`{}`".format).sort_values(ascending=False)
    # Many trainings ran side by side, so their times say little.
    table = tables["dtd10"].drop(columns=["learning rate", "weight decay", "seconds"])
    for place, name in enumerate(IMAGES[1:], start=2):
        table.insert(place, name, tables[name][name])
    table.insert(4, "mean", means.map("{:.1f}".format))
    return table.loc[means.index]


def forgetting() -> pd.DataFrame:
    """Perplexities of target and source, the best one of the target first."""
    runs = pd.read_csv(RESULTS / "forgetting_tinyshakespeare.csv")
    columns = ["target perplexity", "source perplexity"]
    table = comparison_table(runs, columns, digits=1)[["trainable parameters", *columns]]
    return table.sort_values(columns[0], key=lambda cells: cells.str.split().str[0].astype(float))


def segmentation() -> pd.DataFrame:
    """Mean IoU and pixel accuracy of one seed."""
    runs = pd.read_csv(RESULTS / "segmentation_camvid.csv", index_col="method")
    table = runs["trainable_parameters"].map("{:,}".format).to_frame("trainable parameters")
    table["learning rate"] = runs["learning_rate"].map("{:g}".format)
    for column in ("eval_mean_iou", "test_mean_iou", "test_pixel_accuracy"):
        name = column.replace("eval", "validation").replace("mean_iou", "mIoU").replace("_", " ")
        table[name] = runs[column].map("{:.3f}".format)
    return table.rename(index="`{}`".format)


def focus_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each kind of map and method, the highest focus first.

    Args:
        runs: those of `focus.py`.
    """
    groups = runs.groupby(["relevance", "method"])
    order = groups["focus"].mean().sort_values(ascending=False).index
    table = groups[["focus", "accuracy"]].agg(mean_and_deviation, 1).loc[order].reset_index("relevance")
    return table.rename(index="`{}`".format)


def curves_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each kind of map of the method that patches were deleted and inserted with, the lowest first.

    Args:
        runs: those of `focus.py`.
    """
    groups = runs.dropna(subset=["deletion"]).groupby("relevance")[["deletion", "insertion"]]
    return groups.agg(mean_and_deviation, 1).loc[groups.mean().sort_values("deletion").index]


def shares_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each class, the one with most pixels first.

    Args:
        runs: those of `mask_shares.py`.
    """
    groups = runs.groupby("class", sort=False)
    table = groups["pixels"].first().map("{:.1f} %".format).to_frame("share of pixels")
    # Only the trained ones depend on the seed.
    table["start"] = groups["start"].first().map("{:.2f}".format)
    table["trained"] = groups["trained"].agg(mean_and_deviation, 2)
    table["requested"] = groups["requested"].mean().map("{:.2f}".format).replace("nan", "")
    return table.loc[groups["pixels"].first().sort_values(ascending=False).index]


def side_by_side(table: Callable[[pd.DataFrame], pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """One of the tables of `focus.py` for both data sets, in the order of the first.

    Args:
        table: makes it of runs.
        keys: the columns that name a row; the first one becomes the index.
    """
    runs = {name: pd.read_csv(RESULTS / f"focus_{name}.csv") for name in MOSAICS}
    tables = {name: table(frame).reset_index().set_index(keys) for name, frame in runs.items()}
    named = [frame.rename(columns=f"{name}: {{}}".format) for name, frame in tables.items()]
    return pd.concat(named, axis=1).reset_index(keys[1:])


def focus() -> pd.DataFrame:
    """Focus of each kind of map and method, in per cent."""
    return side_by_side(focus_table, ["method", "relevance"])


def curves() -> pd.DataFrame:
    """Areas under deletion and insertion of patches with TOAST-Lite, in per cent."""
    return side_by_side(curves_table, ["relevance"])


def mask_shares() -> pd.DataFrame:
    """The mask on the pixels of each class, relative to their number."""
    return shares_table(pd.read_csv(RESULTS / "mask_shares_camvid.csv"))


if __name__ == "__main__":
    for table in (images(), forgetting(), segmentation(), focus(), curves(), mask_shares()):
        print(table.to_markdown(disable_numparse=True), end="\n\n")
