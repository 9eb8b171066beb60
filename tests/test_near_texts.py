"""`near_texts.py`: each text is in the one folder that it belongs to."""

import json
from pathlib import Path

import near_texts
from datasets import load_dataset


def save(folder: Path, **splits: list[dict[str, object]]) -> str:
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder)


def test_texts_are_parted_by_dialogue_and_by_topic(tmp_path: Path) -> None:
    speaks, silent = {"text": 'She said: "Go."'}, {"text": "It rained."}
    stories = save(tmp_path / "stories", train=[speaks, silent, silent], test=[silent, speaks])
    rows = [{"text": f"{number}", "label": number % 2} for number in range(40)]
    news = save(tmp_path / "news", train=rows[:10], test=rows[10:])
    (tmp_path / "news" / "classes.json").write_text('["Sports", "Sci/Tech"]')
    sets = near_texts.main(["--stories", stories, "--news", news, "--output_dir", str(tmp_path / "near")])
    texts = {name: {split: list(of["text"]) for split, of in splits.items()} for name, splits in sets.items()}
    assert texts["stories_with_dialogue"] == {"train": [speaks["text"]], "test": [speaks["text"]]}
    assert texts["stories_without"] == {"train": [silent["text"]] * 2, "test": [silent["text"]]}
    sports, technology = texts["news_sports"], texts["news_sci_tech"]
    assert sorted(map(int, sports["train"] + sports["test"])) == list(range(0, 40, 2))
    assert sorted(map(int, technology["train"] + technology["test"])) == list(range(1, 40, 2))
    assert len(sports["test"] + technology["test"]) == 8
    saved = load_dataset("json", data_files=str(tmp_path / "near" / "news_sci_tech" / "test.jsonl"), split="train")
    assert saved.column_names == ["text"]
    assert list(saved["text"]) == technology["test"]
