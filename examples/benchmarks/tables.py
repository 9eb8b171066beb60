"""Tables of the benchmarks. As a script it prints those of the measured results, as they are in the documentation.

python examples/benchmarks/tables.py
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results"
IMAGES = ("dtd10", "flowers5", "cifar10")
FIVE_SETS = (*IMAGES, "digits", "street_crops")  # those of `shifted_images.py` as well
TEXTS = ("trec6", "sst2", "agnews", "clinc150")
MOSAICS = ("dtd10", "flowers5")
TARGET = "target perplexity"
LEARNED = ("tinyshakespeare", "tinyshakespeare_1000_steps", "news_sports")  # by language models
ROUTED, BY_ORACLE = ("gated adapters", "gated adapters, refitted"), ", oracle"
CHANGES = ("mean change", "largest change")  # of the perplexities of the sources, in per cent


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


def images(names: Sequence[str] = IMAGES) -> pd.DataFrame:
    """Accuracies in per cent of the methods that were measured on all of some sets of images, the best mean first.

    Args:
        names: of the data sets; the costs are those on the first.
    """
    return accuracies("comparison", names)


def texts(names: Sequence[str] = TEXTS) -> pd.DataFrame:
    """The same of sets of texts.

    Args:
        names: of the data sets; the costs are those on the first.
    """
    return accuracies("texts", names)


def accuracies(benchmark: str, names: Sequence[str]) -> pd.DataFrame:
    """`comparison_table` with the accuracies on several data sets and their mean, without what was chosen on each.

    Args:
        benchmark: what the files with the trainings start with.
        names: of the data sets.
    """
    runs = {name: pd.read_csv(RESULTS / f"{benchmark}_{name}.csv") for name in names}
    percent = {name: frame.assign(**{name: 100 * frame["accuracy"]}) for name, frame in runs.items()}
    tables = {name: comparison_table(frame, [name], digits=1) for name, frame in percent.items()}
    tested = [frame[frame["split"] == "test"].groupby("method")[name].mean() for name, frame in percent.items()]
    means = pd.concat(tested, axis=1).dropna().mean(axis=1).rename("`{}`".format).sort_values(ascending=False)
    # Many trainings ran side by side, so their times say little.
    table = tables[names[0]].drop(columns=["learning rate", "weight decay", "seconds"])
    for place, name in enumerate(names[1:], start=2):
        table.insert(place, name, tables[name][name])
    table.insert(1 + len(names), "mean", means.map("{:.1f}".format))
    return table.loc[means.index]


def perplexity_of(source: str) -> str:
    """The column with the perplexity of a source."""
    return f"{source} perplexity"


def unchanged_of(text: str) -> str:
    """The column with the percentage of the tokens of a text that have the logits of the base model."""
    return f"{text} unchanged"


def column_at(column: str, alpha: float) -> str:
    """Where the value of a column at a strength is among those of a training."""
    return f"{column} at {alpha:g}"


def at_every_strength(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each training and strength, which is the column "alpha".

    Args:
        runs: one row for each training, with columns of the strengths as `column_at` names them.
    """
    plain = [name for name in runs if " at " not in name]
    alphas = {1.0} | {float(name.rpartition(" at ")[2]) for name in runs if name not in plain}
    frames = []
    for alpha in sorted(alphas, reverse=True):
        scaled = (
            {} if alpha == 1 else {name: column_at(name, alpha) for name in plain if column_at(name, alpha) in runs}
        )
        frames.append(runs[plain].assign(**{name: runs[at] for name, at in scaled.items()}, alpha=alpha))
    return pd.concat(frames, ignore_index=True)


def choice_at_limit(points: pd.DataFrame, limit: float, change: str = CHANGES[0]) -> pd.Series:
    """The lowest target perplexity among those that change the sources little enough; if none does, the least change.

    Args:
        points: one row for each training and strength.
        limit: of the change, in per cent.
        change: the column with it.
    """
    within = points[points[change] <= limit]
    return points.loc[points[change].idxmin()] if within.empty else within.loc[within[TARGET].idxmin()]


def choices_at_limit(runs: pd.DataFrame, limit: float, change: str = CHANGES[0]) -> dict[str, pd.Series]:
    """For each method what the validation chooses at a limit, of the tested learning rates and all strengths.

    Args:
        runs: one row for each training.
        limit: of the change, in per cent.
        change: the column with it.
    """
    tested = runs[runs["split"] == "test"].groupby("method")["learning_rate"].unique()
    tried = at_every_strength(runs[runs["split"] == "validation"])
    return {
        method: choice_at_limit(points[points["learning_rate"].isin(tested[method])], limit, change)
        for method, points in tried.groupby("method", sort=False)
        if method in tested
    }


def limit_table(runs: pd.DataFrame, limit: float, change: str = CHANGES[0]) -> pd.DataFrame:
    """One row for each method: its tests at what the validation chose at a limit, the best one first.

    Args:
        runs: one row for each training.
        limit: of the change, in per cent.
        change: the column with it.
    """
    points = at_every_strength(runs[runs["split"] == "test"])
    tested = {}
    for method, chosen in choices_at_limit(runs, limit, change).items():
        is_chosen = points[["method", "learning_rate", "alpha"]] == [method, chosen["learning_rate"], chosen["alpha"]]
        tested[method] = points[is_chosen.all(axis=1)]
    rows = sorted(tested.values(), key=lambda tests: tests[TARGET].mean())
    return pd.DataFrame([limit_row(tests) for tests in rows]).set_index("method")


def limit_row(tested: pd.DataFrame) -> dict[str, str]:
    """A row of `limit_table`; with a gate there are also the percentages of unchanged tokens, behind the perplexities.

    Args:
        tested: the tests of a method at a learning rate and a strength.
    """
    first = tested.iloc[0]
    row = {"method": f"`{first['method']}`", "learning rate": f"{first['learning_rate']:.1e}"}
    row |= {"alpha": f"{first['alpha']:g}"}
    row |= {TARGET: mean_and_deviation(tested[TARGET], 1)}
    row |= {f"{change}, %": mean_and_deviation(tested[change], 1) for change in CHANGES}
    row["forgetting"] = f"{tested['forgetting'].mean():.3f}"
    for column in (name for name in tested if name.endswith(" perplexity") and name != TARGET):
        source = column.removesuffix(" perplexity")
        same = tested[unchanged_of(source)].mean() if unchanged_of(source) in tested else math.nan
        row[source] = f"{tested[column].mean():.3g}" + ("" if math.isnan(same) else f" ({same:.0f} %)")
    return row


def forgetting(change: str = CHANGES[0], learned: str = LEARNED[0]) -> pd.DataFrame:
    """What each method reaches at a change of 1 % of the other domains, in the mean or the largest.

    Args:
        change: the column with it.
        learned: one of `LEARNED`.
    """
    return limit_table(pd.read_csv(RESULTS / f"forgetting_{learned}.csv"), 1.0, change)


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


def continual_images_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each method and number of learned tasks: accuracies, and what of the source is unchanged.

    Args:
        runs: those of `continual_images.py`.
    """
    source = runs["set"].iloc[0]
    keys = ["method", "after"]
    table = runs.groupby([*keys, "set"], sort=False)["accuracy"].agg(mean_and_deviation, 1).unstack(sort=False)
    of_source = runs[runs["set"] == source].groupby(keys, sort=False)
    for column in ("same prediction", "unchanged"):
        table[f"{source}: {column}"] = of_source[column].agg(mean_and_deviation, 1)
    return table.fillna("").reset_index("after")


def routing_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each kind of gates and set after all tasks: accuracies by who chooses, and how far gates are open.

    Args:
        runs: those of `continual_images.py`.
    """
    keys, last = ["method", "set"], runs[runs["after"] == runs["after"].max()]
    groups = last[last["method"].isin(ROUTED)].groupby(keys, sort=False)
    by_oracle = last.assign(method=last["method"].str.removesuffix(BY_ORACLE))[last["method"].str.endswith(BY_ORACLE)]
    by_oracle = by_oracle.groupby(keys, sort=False)
    columns = {
        "oracle": by_oracle["accuracy"],
        "self-routed": groups["accuracy"],
        "self-routed, head as well": groups["accuracy by gates"],
        "right head": groups["right head"],
    }
    table = pd.DataFrame({name: values.agg(mean_and_deviation, 1) for name, values in columns.items()})
    for name in (column for column in runs if column.startswith("gate of ")):
        table[name] = groups[name].mean().map("{:.2f}".format)
    return table.loc[list(groups.groups)].reset_index("set")


def steering_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each training and kind of prompt.

    Args:
        runs: those of `steering.py`.
    """
    measured = [column for column in runs if column not in ("training", "prompt", "seed")]
    table = runs.groupby(["training", "prompt"])[measured].agg(mean_and_deviation, 1)
    names = [f"{training}, {prompt}" for training, prompt in table.index]
    return table.set_axis(pd.Index(names, name="trained on, prompt"))


def side_by_side(table: Callable[[pd.DataFrame], pd.DataFrame], benchmark: str, keys: list[str]) -> pd.DataFrame:
    """One of the tables of mosaics for both data sets, in the order of the first.

    Args:
        table: makes it of runs.
        benchmark: whose runs, the name of its script.
        keys: the columns that name a row; the first one becomes the index.
    """
    runs = {name: pd.read_csv(RESULTS / f"{benchmark}_{name}.csv") for name in MOSAICS}
    tables = {name: table(frame).reset_index().set_index(keys) for name, frame in runs.items()}
    named = [frame.rename(columns=f"{name}: {{}}".format) for name, frame in tables.items()]
    return pd.concat(named, axis=1).reset_index(keys[1:])


def focus() -> pd.DataFrame:
    """Focus of each kind of map and method, in per cent."""
    return side_by_side(focus_table, "focus", ["method", "relevance"])


def curves() -> pd.DataFrame:
    """Areas under deletion and insertion of patches with TOAST-Lite, in per cent."""
    return side_by_side(curves_table, "focus", ["relevance"])


def steering() -> pd.DataFrame:
    """How far mask and prediction follow a request, in per cent."""
    return side_by_side(steering_table, "steering", ["trained on, prompt"])


def continual_images() -> pd.DataFrame:
    """Accuracies after each of three sets of images, in per cent."""
    return continual_images_table(pd.read_csv(RESULTS / "continual_images.csv"))


def routing() -> pd.DataFrame:
    """What it costs that gated adapters choose themselves, in per cent."""
    return routing_table(pd.read_csv(RESULTS / "continual_images.csv"))


def mask_shares() -> pd.DataFrame:
    """The mask on the pixels of each class, relative to their number."""
    return shares_table(pd.read_csv(RESULTS / "mask_shares_camvid.csv"))


if __name__ == "__main__":
    learned = (forgetting(change, name) for name in LEARNED for change in CHANGES)
    of_masks = (focus(), curves(), mask_shares(), steering())
    of_images = (images(FIVE_SETS), images())
    for table in (*of_images, texts(), *learned, segmentation(), *of_masks, continual_images(), routing()):
        print(table.to_markdown(disable_numparse=True), end="\n\n")
