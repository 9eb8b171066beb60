"""A stand-in for the Hugging Face Hub, as the tests have no network."""

import functools
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

COMMIT = "0123456789" * 4


class Hub:
    """Any repository is the folder `folder`.

    Args:
        path: where it is made.
        monkeypatch: replaces the download functions of PEFT and transformers for a test.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = path / "snapshots" / COMMIT
        self.folder.mkdir(parents=True)
        # What was asked for: repository, file, subfolder, revision.
        self.requests: list[tuple[str, str, str | None, str | None]] = []

        @functools.wraps(huggingface_hub.hf_hub_download)  # PEFT looks at its signature
        def download(repo_id: str, filename: str, **kwargs: Any) -> str:
            subfolder = kwargs.get("subfolder")
            self.requests.append((repo_id, filename, subfolder, kwargs.get("revision")))
            return self.file(None, str(Path(subfolder or "", filename)))

        monkeypatch.setattr("peft.config.hf_hub_download", download)
        monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", download)
        monkeypatch.setattr("peft.utils.save_and_load.huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda *args, **kwargs: True)
        monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
        monkeypatch.setattr("transformers.utils.hub._get_cache_file_to_return", self.file)

    def file(self, repo_id: str | None, name: str, *args: Any, **kwargs: Any) -> str:
        return str(self.folder / name)
