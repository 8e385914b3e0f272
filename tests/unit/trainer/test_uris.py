"""What a URI's thing is called."""

import pytest

from qlora_trainer.uris import short_name


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf://Qwen/Qwen2-7B", "Qwen2-7B"),
        ("hf://Qwen/Qwen2-7B@v1.0", "Qwen2-7B"),
        ("hf://Qwen/Qwen2-7B@refs/pr/1", "Qwen2-7B"),
        ("s3://models/team/SmolLM2-135M/", "SmolLM2-135M"),
        ("s3://models/at@home", "at@home"),
        ("pvc://weights", "weights"),
    ],
)
def test_a_thing_is_called_by_the_end_of_its_uri(uri: str, name: str) -> None:
    assert short_name(uri) == name
