r"""Make texts that are hard to tell apart, as folders for `forgetting.py`, `gates.py` and `text_gates.py`.

    python examples/benchmarks/near_texts.py --stories tinystories --news agnews --output_dir outputs/near_texts

- stories_with_dialogue, stories_without: stories with quotation marks, in which somebody speaks, and the others
- news_world, news_sports and so on: news of one topic each; a fifth of all news is the split "test"

`stories` and `news` are folders with train and test files, .jsonl or .jsonl.gz, with the column "text"; those of the
news also with "label", the number of the topic in `classes.json`, a list of their names.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from cost import HelpFormatter
from datasets import DatasetDict, concatenate_datasets
from gates import load_folder
from transformers import HfArgumentParser


@dataclass
class Arguments:
    """Of what to make them."""

    stories: str = field(metadata={"help": "Folder of stories."})
    news: str = field(metadata={"help": "Folder of news with topics."})
    output_dir: str = field(default="outputs/near_texts", metadata={"help": "Folder for the folders of texts."})


def by_dialogue(stories: DatasetDict) -> dict[str, DatasetDict]:
    """The stories in which somebody speaks, and the others."""
    return {
        "stories_with_dialogue": stories.filter(lambda row: '"' in row["text"]),
        "stories_without": stories.filter(lambda row: '"' not in row["text"]),
    }


def by_topic(news: DatasetDict, topics: list[str]) -> dict[str, DatasetDict]:
    """The news of each topic, anew parted into "train" and "test", as few are to train on."""
    parts = concatenate_datasets(list(news.values())).train_test_split(0.2, seed=0)
    return {
        f"news_{topic.lower().replace('/', '_')}": parts.filter(lambda row, number=number: row["label"] == number)
        for number, topic in enumerate(topics)
    }


def main(arguments: list[str] | None = None) -> dict[str, DatasetDict]:
    """Make and save all of them.

    Args:
        arguments: as on the command line.

    Returns:
        The texts by the names of their folders, with the splits "train" and "test" and the column "text".
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    topics = json.loads((Path(parsed.news) / "classes.json").read_text())
    sets = by_dialogue(load_folder(parsed.stories)) | by_topic(load_folder(parsed.news), topics)
    sets = {name: texts.select_columns("text") for name, texts in sets.items()}
    for name, texts in sets.items():
        folder = Path(parsed.output_dir) / name
        for split, rows in texts.items():
            rows.to_json(folder / f"{split}.jsonl")
        print(f"{folder}: {', '.join(f'{len(rows)} for {split}' for split, rows in texts.items())}")
    return sets


if __name__ == "__main__":
    main()
