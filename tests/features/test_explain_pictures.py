"""Figures and pages of an explanation: what is in them, and that any text and number may be."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from toast_peft import Explanation, explain
from toast_peft.explanation.attention import attention_rollout
from toast_peft.explanation.page import MOST_NUMBERS
from toast_peft.explanation.text_pictures import places, readable

from ..helpers import steered
from ..zoo import images, inputs_of, tiny_model
from .test_gate import gated, inputs_for

NASTY = '</script><script>alert("$x$ & <b>")</script>\n'


class Tokenizer:
    """Names each token by its number, one of them badly."""

    def decode(self, ids: list[int]) -> str:
        return NASTY if ids[0] % 5 == 0 else f" w{ids[0]}"


def explained(model_class: type, **options: Any) -> Explanation:
    model = steered(tiny_model(model_class, **options))
    return explain(model, inputs_of(model), Tokenizer())


@pytest.fixture(scope="module")
def of_images() -> Explanation:
    return explained(tf.ViTForImageClassification)


@pytest.fixture(scope="module")
def of_texts() -> Explanation:
    return explained(tf.LlamaForCausalLM)


def data_of(explanation: Explanation) -> dict[str, Any]:
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', explanation.to_html())
    return json.loads(text)


def heats(figure: Any) -> list[np.ndarray]:
    """The maps over the images, row by row."""
    return [np.asarray(axis.images[1].get_array()) for axis in figure.axes if len(axis.images) == 2]


# ------------------------------------------------------------------------------------------------------------- figures


def test_figure_of_images_has_the_maps(of_images: Explanation) -> None:
    figure = of_images.plot(block=2, head=1, sinks="keep")
    for row in range(2):
        mask, first, second, change = heats(figure)[4 * row : 4 * row + 4]
        expected = [
            of_pass.attentions[2][row, 1, 0, 1:].reshape(2, 2) for of_pass in (of_images.first, of_images.second)
        ]
        np.testing.assert_array_equal(mask, of_images.mask[row, 1:].reshape(2, 2))
        np.testing.assert_array_equal([first, second], expected)
        np.testing.assert_array_equal(change, expected[1] - expected[0])
    limits = [axis.images[1].get_clim() for axis in figure.axes if len(axis.images) == 2]
    assert limits[:4] == limits[4:] and limits[1] == limits[2] and limits[3][0] == -limits[3][1]
    assert limits[1][1] == max(map(np.max, heats(figure)[1:3] + heats(figure)[5:7]))


def test_figure_says_where_it_clips(of_images: Explanation) -> None:
    clipped, kept = of_images.plot(), of_images.plot(sinks="keep")
    labels = [[axis.get_xlabel() for axis in figure.axes] for figure in (clipped, kept)]
    assert "attention, clipped at its 95% quantile" in labels[0] and "attention" in labels[1]
    for one, other in zip(heats(clipped), heats(kept), strict=True):
        np.testing.assert_array_equal(one, other)


def test_figure_of_rollout_and_of_another_query(of_images: Explanation) -> None:
    [_, first, *_] = heats(of_images.plot([1], rollout=True))
    np.testing.assert_allclose(first.ravel(), attention_rollout(of_images.first.attentions)[1, 0, 1:])
    [_, first, *_] = heats(of_images.plot([1], query=3))
    np.testing.assert_allclose(first.ravel(), of_images.first.attentions[-1][1, :, 3, 1:].mean(0))


@pytest.mark.parametrize("gate, num_maps", [("sequence", 4), ("token", 5)])
def test_gate_of_patches_is_a_map_and_that_of_an_image_a_line(gate: str, num_maps: int) -> None:
    model = gated(tf.ViTForImageClassification, gate)
    found = explain(model, inputs_for(model))
    figure = found.plot()
    maps = heats(figure)
    assert len(maps) == 2 * num_maps
    assert f"gate: {found.gate[1].mean():.0%} open" in "".join(axis.get_xlabel() for axis in figure.axes)
    if gate == "token":
        np.testing.assert_array_equal(maps[0], found.gate[0, 1:].reshape(2, 2))
    gates = [row["gate"]["values"] for row in data_of(found)["rows"]]
    np.testing.assert_allclose(np.array(gates) / 1e4, found.gate[:, 1:], atol=6e-5)


def test_figure_of_texts_has_tokens_and_predictions(of_texts: Explanation) -> None:
    figure = of_texts.plot([0], query=4)
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert len(texts) == 4 * 9 and "w13" in texts
    assert any(axis.get_title("left").endswith("in pass 2") for axis in figure.axes)
    widths = [bar.get_width() for axis in figure.axes for bar in axis.patches if hasattr(bar, "get_width")]
    expected = [p.first for p in of_texts.predictions(0, 4)] + [p.second for p in of_texts.predictions(0, 4)]
    assert set(np.round(expected, 5)) <= set(np.round(widths, 5))
    figure.canvas.draw()


def test_long_texts_go_over_several_lines() -> None:
    names = ["a" * 30] * 7
    assert list(places(names)) == [(i // 3, 31 * (i % 3)) for i in range(7)]
    assert readable("\n") == "\\n" and readable("  ") == "␣" and len(readable("x" * 500)) < 100


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.html"])
def test_saves_what_the_name_says(of_images: Explanation, tmp_path: Path, name: str) -> None:
    of_images.save(tmp_path / name)
    start = {"x.png": b"\x89PNG", "x.svg": b"<?xml", "x.html": b"<!doctype html>"}[name]
    assert (tmp_path / name).read_bytes().startswith(start)


def test_options_of_figures_are_refused_for_pages(of_images: Explanation, tmp_path: Path) -> None:
    of_images.save(tmp_path / "x.png", block=0, rows=[0])
    with pytest.raises(ValueError, match=r"\['block'\] were given for a page"):
        of_images.save(tmp_path / "x.html", block=0)


def test_without_matplotlib_there_are_pages_only(of_images: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'toast_peft\[explain\]'"):
        of_images.plot()
    assert of_images.to_html().startswith("<!doctype html>")


def test_maps_without_images_cannot_be_drawn() -> None:
    found = explained(tf.ConvNextForImageClassification)
    without = Explanation(**{**vars(found), "images": None, "grid": None})
    with pytest.raises(ValueError, match="There are no images to draw on"):
        without.plot()


# --------------------------------------------------------------------------------------------------------------- pages


def test_page_of_images_has_the_numbers(of_images: Explanation) -> None:
    [row, other] = data_of(of_images)["rows"]
    assert row["image"].startswith("data:image/png;base64,") and row["image"] != other["image"]
    np.testing.assert_allclose(np.array(row["mask"]["values"]) / 1e4, of_images.mask[0, 1:], atol=6e-5)
    for index, of_pass in enumerate((of_images.first, of_images.second)):
        [*blocks, rollout] = row["attention"][index]
        found = np.array(blocks)[:, :, 0] / 1e4
        expected = np.array(of_pass.attentions)[:, 0, :, 0, 1:]
        np.testing.assert_allclose(found[:, 1:], expected, atol=6e-5)
        np.testing.assert_allclose(found[:, 0], expected.mean(1), atol=6e-5)
        np.testing.assert_allclose(
            np.array(rollout[0][0]) / 1e4, attention_rollout(of_pass.attentions)[0, 0, 1:], atol=6e-5
        )
    assert sorted(row["norms"]) == ["0", "1", "2", "3"] and row["norms"]["0"]["grid"] == [2, 2]
    assert [line[0] for line in row["predictions"][0]] == [p.label for p in of_images.predictions(0)]


def test_page_keeps_any_text_as_text(of_texts: Explanation) -> None:
    page = of_texts.to_html()
    assert page.count("</script>") == 2 and "<script>alert" not in page
    tokens = data_of(of_texts)["rows"][0]["tokens"]
    assert tokens == of_texts.tokens[0] and NASTY in tokens
    assert "alert(&quot;" not in page and "&lt;iframe" not in of_texts._repr_html_()
    assert of_texts._repr_html_().count("<") == 2  # all of the page is in an attribute


def test_page_loads_nothing(of_images: Explanation) -> None:
    page = of_images.to_html()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|//cdn|@import|url\(|<link(?! rel=\"icon\" href=\"data:)", page)


def test_padding_is_not_in_the_page() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    inputs = inputs_of(model) | {"attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, :4] = 0
    found = explain(model, inputs)
    [_, row] = data_of(found)["rows"]
    assert len(row["tokens"]) == len(row["mask"]["values"]) == len(row["predictions"]) == 5
    assert np.shape(row["attention"][0][0]) == (5, 5, 5)  # the mean and four heads
    found.plot().canvas.draw()


def test_long_texts_have_less_in_their_page(of_texts: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = 2 * sum(attention.size for attention in of_texts.first.attentions)
    assert numbers < MOST_NUMBERS
    for most, shape in ((numbers, (5, 9)), (numbers // 4, (1, 9)), (numbers // 8, (1, 1))):
        monkeypatch.setattr("toast_peft.explanation.page.MOST_NUMBERS", most)
        assert np.shape(data_of(of_texts)["rows"][0]["attention"][0][0])[:2] == shape


def test_page_of_windows_has_the_maps_of_each_block() -> None:
    found = explained(tf.SwinForImageClassification)
    row = data_of(found)["rows"][1]
    assert [of_block["grid"] for of_block in row["maps"]] == [[16, 16], [16, 16], [8, 8], [8, 8]]
    for index, of_pass in enumerate((found.first, found.second)):
        for block, maps in zip(row["attention"][index], of_pass.received, strict=True):
            expected = maps[1].reshape(len(maps[1]), -1)
            np.testing.assert_allclose(np.array(block)[1:, 0] / 1e4, expected, atol=6e-5)
            np.testing.assert_allclose(np.array(block)[0, 0] / 1e4, expected.mean(0), atol=6e-5)


def test_maps_lie_on_the_pixels_that_they_are_made_of() -> None:
    """34 x 46 pixels are 17 x 23 patches, which the second stage fills up to 18 x 24 and merges."""
    inputs = images(34, 46) | {"interpolate_pos_encoding": True}
    found = explain(steered(tiny_model(tf.SwinForImageClassification), inputs), inputs)
    figure = found.plot([0], block=0)
    mask, attention, *_ = [axis for axis in figure.axes if len(axis.images) == 2]
    assert mask.images[1].get_extent() == [0, 48, 36, 0] and attention.images[1].get_extent() == [0, 46, 34, 0]
    assert mask.get_xlim() == (0, 46) and mask.get_ylim() == (34, 0)
    row = data_of(found)["rows"][0]
    np.testing.assert_allclose(row["mask"]["cover"], [36 / 34, 48 / 46], atol=1e-5)
    assert [of_block["cover"] for of_block in row["maps"][:2]] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("model_class", [tf.ConvNextForImageClassification, tf.Wav2Vec2ForCTC])
def test_models_without_attentions_have_mask_and_norms(model_class: type) -> None:
    found = explained(model_class)
    row = data_of(found)["rows"][0]
    assert row["attention"] == [] and len(row["norms"]) == 4
    found.plot().canvas.draw()
